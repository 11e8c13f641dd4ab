#!/bin/sh
# The gateway's API with curl, step by step. Start a gateway first: ownware serve
#
#   sh examples/walkthrough.sh
#
# OWNWARE_GATEWAY is the gateway's address, OWNWARE_GATEWAY_TOKEN its token (where it wants one),
# OWNWARE_PROFILE the agent to talk to. Uses the built-in model, so it needs no key.
set -eu

gateway=${OWNWARE_GATEWAY:-http://localhost:3011}
api=$gateway/api/v1
profile=${OWNWARE_PROFILE:-assistant}
model=demo:assistant

# Every request carries these headers. A gateway that wants no token ignores it.
request() {
    curl --silent --show-error --fail-with-body --max-time 60 \
        -H "Authorization: Bearer ${OWNWARE_GATEWAY_TOKEN:-}" "$@"
}
post() {
    path=$1
    body=$2
    request -H 'Content-Type: application/json' -d "$body" "$api$path"
}

# The value of a field in one line of JSON: a text or a number. (jq does this better.)
field() {
    sed -n "s/.*\"$1\":\"\{0,1\}\([^\",}]*\).*/\1/p" | head -n 1
}
# Until a run waits for a person.
wait_for() {
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        if request "$api/runs/$1" | grep -q '"status":"waiting"'; then break; fi
        sleep 1
    done
}
step() {
    printf '\n\n== %s\n' "$1"
}

step 'Is it up? This never needs a token.'
request "$api/health"

step 'Which models are there, and which can be used now?'
request "$api/models" | tr '}' '\n' | grep '"hasCredentials":true'

step 'Which agents are there?'
request "$api/profiles"

step 'Start a run. The answer comes as soon as the run is durable, not when it is over.'
run=$(post /run "{\"profileId\":\"$profile\",\"model\":\"$model\",\"prompt\":\"count to 5\"}")
printf '%s\n' "$run"
thread=$(printf '%s' "$run" | field threadId)
run_id=$(printf '%s' "$run" | field runId)

step 'Stream that run: it ends with the run. Every frame has an id, which is a cursor.'
stream=$(request -N "$api/runs/$run_id/events")
printf '%s\n' "$stream"

step 'Stream the thread instead. It stays open for the next run, unless follow=false.'
request -N "$api/threads/$thread/agents/root/events?since=0&follow=false" | grep '^event:'

step 'Go on after a cut connection: since=3 leaves out the first three events ...'
request -N "$api/threads/$thread/agents/root/events?since=3&follow=false" | grep '^id:' | head -n 1

step '... and so does Last-Event-ID, which is what a browser sends by itself.'
cursor=$(printf '%s' "$stream" | sed -n 's/^id: //p' | sed -n 3p)
request -N -H "Last-Event-ID: $cursor" \
    "$api/threads/$thread/agents/root/events?follow=false" | grep '^id:' | head -n 1

step 'In the same thread, ask for something that an agent may not do without being allowed to.'
prompt='write hello.txt: hello from a walk-through'
body="{\"profileId\":\"$profile\",\"model\":\"$model\",\"threadId\":\"$thread\",\"prompt\":\"$prompt\"}"
run_id=$(post /run "$body" | field runId)
wait_for "$run_id"
# The same events as JSON: the last one is the question, and shows what is to be allowed.
question=$(request "$api/threads/$thread/agents/root/events/history" |
    sed -n 's/.*\({"type":"permission.request".*}\)].*/\1/p')
printf '%s\n' "$question"

step 'The run now waits, for minutes or for days, through restarts. All that wait:'
request "$api/approvals"

step 'Say yes, and name the question that is meant.'
request_id=$(printf '%s' "$question" | field requestId)
post "/threads/$thread/resume" "{\"action\":\"approve\",\"requestId\":\"$request_id\"}"

step 'The run goes on. Its stream from the start, the question included:'
request -N "$api/runs/$run_id/events" | grep '^event:' | uniq -c

step 'An agent may also ask something itself: then it wants an answer in words.'
body="{\"profileId\":\"$profile\",\"model\":\"$model\",\"prompt\":\"ask me: Which? [red, green]\"}"
asking=$(post /run "$body")
asking_thread=$(printf '%s' "$asking" | field threadId)
wait_for "$(printf '%s' "$asking" | field runId)"
request "$api/approvals"
echo
post "/threads/$asking_thread/resume" '{"action":"answer","answer":"green"}'
request -N "$api/runs/$(printf '%s' "$asking" | field runId)/events" | grep '^data:.*"question\.'

step 'How it ended, and the whole conversation.'
request "$api/runs/$run_id"
echo
request "$api/threads/$thread/messages"
echo

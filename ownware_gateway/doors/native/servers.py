"""MCP servers through the native door: what there is, adding and enabling some, calling one."""

from typing import Any, Final

from aiohttp import web
from pydantic import Field, ValidationError, model_validator

from ownware_gateway.doors.native.answers import answer
from ownware_gateway.doors.native.bodies import Body, path_id, query, read_body
from ownware_gateway.errors import GatewayError
from ownware_gateway.masking import Masker
from ownware_gateway.mcp import OfferedTool, Servers, ServerStatus, Source
from ownware_gateway.profile.explain import explain
from ownware_gateway.profile.servers import McpServer, ServerName
from ownware_gateway.services import Services

#: The longest name of a tool that can be called.
NAME_CHARS_MAX: Final = 256

#: Recognises keys by their shape, in arguments that should hold none.
_KEYS: Final = Masker()


class ServerBody(Body):
    """`POST /mcp/servers`: a name, and the fields of a server as in a file."""

    id: ServerName | None = None
    name: ServerName | None = None
    settings: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _apart(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        names = {key: data[key] for key in ("id", "name") if key in data}
        rest = {key: value for key, value in data.items() if key not in names}
        return {**names, "settings": rest}

    def server(self) -> McpServer:
        """Return the server; raises GatewayError with what is wrong in it."""
        try:
            return McpServer.model_validate(self.settings)
        except ValidationError as error:
            raise GatewayError("invalid_request", explain(error, McpServer)) from None


class CallBody(Body):
    """`POST /mcp/proxy/{server}/tools/{tool}`."""

    arguments: dict[str, Any] = Field(default_factory=dict)


class ServerHandlers:
    """The handlers; `_servers` is what they open onto."""

    _servers: Servers
    _services: Services
    _servers_may_be_added: bool

    def server_routes(self, base: str) -> list[web.RouteDef]:
        """Return the routes under a path."""
        servers = f"{base}/servers"
        return [
            web.get(servers, self.running_servers),
            web.post(servers, self.add_server),
            web.get(f"{servers}/available", self.available_servers),
            web.get(f"{servers}/config", self.config_servers),
            web.get(f"{servers}/catalog", self.catalog_servers),
            web.post(f"{servers}/catalog/{{name}}/enable", self.enable_server),
            web.delete(f"{servers}/catalog/{{name}}/disable", self.disable_server),
            web.get(f"{servers}/{{server_id}}", self.server),
            web.put(f"{servers}/{{server_id}}", self.replace_server),
            web.delete(f"{servers}/{{server_id}}", self.remove_server),
            web.post(f"{base}/proxy/{{server_id}}/tools/{{tool}}", self.call_tool),
        ]

    async def running_servers(self, request: web.Request) -> web.Response:
        """List the servers that run, or are being started."""
        query(request)
        states = ("ready", "starting", "waiting")
        return answer([_shape(item) for item in self._servers.statuses() if item.state in states])

    async def available_servers(self, request: web.Request) -> web.Response:
        """List every server, whatever its state."""
        query(request)
        return answer([_shape(item) for item in self._servers.statuses()])

    async def config_servers(self, request: web.Request) -> web.Response:
        """List the servers that the gateway's files say to run."""
        return self._of(request, "config")

    async def catalog_servers(self, request: web.Request) -> web.Response:
        """List the servers that the gateway's files hold ready to be enabled."""
        return self._of(request, "catalog")

    def _of(self, request: web.Request, source: Source) -> web.Response:
        query(request)
        return answer([_shape(item) for item in self._servers.statuses() if item.source == source])

    async def server(self, request: web.Request) -> web.Response:
        """Show a server."""
        server_id = path_id(request, "server_id")
        for status in self._servers.statuses():
            if status.id == server_id:
                return answer(_shape(status))
        raise GatewayError("not_found", f"There is no MCP server {server_id!r}.")

    async def add_server(self, request: web.Request) -> web.Response:
        """Add a server for as long as the gateway runs, and start it."""
        self._check_may_add()
        body = await read_body(request, ServerBody)
        name = body.name or body.id
        if name is None:
            raise GatewayError("invalid_request", "The field 'name' is required.")
        if any(item.id == name for item in self._services.statuses()):
            # Else it would have the names of that service's tools, and what people allowed them.
            raise GatewayError(
                "server_exists", f"A service is named {name!r}: choose another name."
            )
        status = await self._servers.add(name, body.server())
        return answer(_shape(status), 201, Location=f"{request.path}/{status.id}")

    def _check_may_add(self) -> None:
        """Raise GatewayError unless callers may choose what runs on this machine."""
        if not self._servers_may_be_added:
            raise GatewayError(
                "forbidden_server",
                "Callers may add no MCP server here: it would be a program of their choice. "
                "Name it in mcp.json, or start the gateway with OWNWARE_MCP_ADD=1.",
            )

    async def replace_server(self, request: web.Request) -> web.Response:
        """Change a server that was added, and start it anew."""
        self._check_may_add()
        name = path_id(request, "server_id")
        body = await read_body(request, ServerBody)
        if {body.name or name, body.id or name} != {name}:
            raise GatewayError("invalid_request", "A server cannot be given another name.")
        return answer(_shape(await self._servers.replace(name, body.server())))

    async def remove_server(self, request: web.Request) -> web.Response:
        """Stop and forget a server that was added."""
        await self._servers.remove(path_id(request, "server_id"))
        return web.Response(status=204)

    async def enable_server(self, request: web.Request) -> web.Response:
        """Start a server of the catalogue for as long as the gateway runs."""
        return answer(_shape(await self._servers.enable(path_id(request, "name"))), 201)

    async def disable_server(self, request: web.Request) -> web.Response:
        """Stop a server that was enabled."""
        await self._servers.disable(path_id(request, "name"))
        return web.Response(status=204)

    async def call_tool(self, request: web.Request) -> web.Response:
        """Call a tool outside of any run: whoever may use this door may use the server."""
        body = await read_body(request, CallBody)
        name, tool = path_id(request, "server_id"), request.match_info["tool"][:NAME_CHARS_MAX]
        called = await self._servers.call(name, tool, body.arguments)
        output = called.output
        failed = called.error is not None or (output is not None and output.is_error)
        text = output.text if output is not None else None
        return answer(
            {
                "success": not failed,
                "result": text,
                "error": called.error or (text if failed else None),
                "isError": failed,
                "is_error": failed,
            }
        )


def _shape(status: ServerStatus) -> dict[str, Any]:
    """Return a server as people may see it."""
    settings = status.settings.shown()
    running = status.state == "ready"
    return {
        "id": status.id,
        "name": status.name,
        "description": settings["description"],
        "enabled": settings["enabled"] or status.state != "stopped",
        "transport": settings["transport"],
        "command": settings["command"],
        "args": _KEYS.value(settings["args"]),
        "env": settings["env"],
        "url": settings["url"],
        "headers": settings["headers"],
        "trusted": settings["trusted"],
        "startTimeout": settings["startTimeout"],
        "callTimeout": settings["callTimeout"],
        "requiredEnvVars": list(status.required_env),
        "isAvailable": not status.missing_env,
        "isRunning": running,
        "isConfig": status.source == "config",
        "source": status.source,
        "profileId": status.profile_id,
        "state": status.state,
        "error": status.error,
        "tools": [_tool_shape(tool) for tool in status.tools],
        "leftOut": list(status.left_out),
        "stderr": list(status.stderr),
        "restarts": status.restarts,
        "readySince": status.ready_since,
        "pid": status.pid,
        "protocolVersion": status.version,
    }


def _tool_shape(tool: OfferedTool) -> dict[str, Any]:
    return {
        "name": tool.name,
        "serverName": tool.wire_name,
        "description": tool.description,
        "enabled": True,
        "inputSchema": tool.input_schema,
        "annotations": {
            "readOnlyHint": tool.reads_only,
            "destructiveHint": tool.destructive,
            "idempotentHint": tool.idempotent,
        },
    }

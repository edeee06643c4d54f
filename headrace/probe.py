"""Checks that need a process of their own: they import much, or might take the process down with them.

`headrace doctor --probe NAME` runs one here and prints a ProbeReport as JSON. Imports are late throughout, because each
probe is to import what it probes and nothing else.
"""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path

from headrace.prepare import ProbeReport

TORCH_CURE = "pip install torch"


def probe_torch() -> ProbeReport:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        return ProbeReport(ok=False, detail=f"cannot be imported: {error}", cure=TORCH_CURE)
    devices = f"{torch.cuda.device_count()} CUDA devices" if torch.cuda.is_available() else "CPU"
    return ProbeReport(ok=True, detail=f"{torch.__version__}, {devices}, {torch.get_num_threads()} threads")


def probe_kernels() -> ProbeReport:
    kernels = importlib.import_module("kernels")
    ours = Path(__file__).resolve().parents[1] / "kernels"
    if Path(str(kernels.__file__)).resolve().parent != ours:
        return ProbeReport(
            ok=False,
            detail=f"`import kernels` finds {kernels.__file__}, which is another project's",
            cure="pip uninstall kernels, then install headrace again",
        )
    try:
        status = importlib.import_module("kernels.native_library").status()
    except ImportError as error:
        return ProbeReport(ok=False, detail=f"cannot be imported: {error}", cure=TORCH_CURE)
    if status.available:
        return ProbeReport(ok=True, detail=f"C++ kernels for {status.instruction_set}")
    return ProbeReport(
        ok=False, detail=f"slow torch kernels are used: {status.reason}", cure="install g++ (apt-get install g++)"
    )


def probe_nixl() -> ProbeReport:
    library = importlib.import_module("kv_transfer.transports.nixl.library")
    errors = importlib.import_module("protocol.errors")
    cure = f"{library.INSTALL_HINT}, or let nodes take another transport: --transport auto"
    try:
        api = library.load_nixl("127.0.0.1")
        agent = library.make_agent(api, "headrace-doctor", progress_delay_us=None)
    except errors.ConfigError as error:
        return ProbeReport(ok=False, detail=error.message, cure=cure)
    return ProbeReport(ok=True, detail=f"agent made, backends {', '.join(agent.backends)}")


PROBES: Mapping[str, Callable[[], ProbeReport]] = {
    "torch": probe_torch,
    "kernels": probe_kernels,
    "nixl": probe_nixl,
}

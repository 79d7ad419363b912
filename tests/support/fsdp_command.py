"""The command line, on ranks without accelerators that share a model all the same.

Usage: fsdp_command.py COMMAND OPTIONS, under torchrun.
"""

import faulthandler

from support.distributed_worker import let_fsdp_shard_on_cpu

from koff.cli import app

if __name__ == "__main__":
    faulthandler.dump_traceback_later(120, exit=True)
    let_fsdp_shard_on_cpu()
    app()

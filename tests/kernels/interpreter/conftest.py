"""These tests run in a process of their own, under KOFF_BACKEND=interpret."""

import pytest

import koffkernels  # noqa: F401  it switches the interpreter on before triton is imported


@pytest.fixture(autouse=True, scope="session")
def prepared_once():
    """Triton 3.7.1 prepares its language anew whenever a kernel calls a function, a third of the
    time of these tests. The launch around such calls has prepared ``tl``; what else a function of
    Triton's own library needs stays from its first call on."""
    from triton.runtime import interpreter

    call, called = interpreter.InterpretedFunction.__call__, set()

    def call_again(self, *args, **kwargs):
        if self.fn not in called:
            called.add(self.fn)
            return call(self, *args, **kwargs)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call_again)
        yield

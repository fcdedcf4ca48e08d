"""torch's compiler is imported when something is compiled, and not before."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

#: Modules of the compiler and what they import; none is needed while nothing is compiled.
COMPILER = ("torch._dynamo", "torch._inductor", "sympy", "triton")


def after(code: str, *, real: bool = False) -> str:
    """What `code` prints in a process of its own. `real`: the compiler must have been imported, else it must not."""
    loaded = f"any(hasattr(sys.modules.get(name), '__file__') for name in {COMPILER!r})"
    script = f"import sys, torch\nfrom uvim_fsq.compilation import compiler_unloaded\n{code}\nassert {loaded} == {real}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


#: What imports the compiler -> an example.
IMPORTERS = {
    "timm": "import timm\n    assert timm.is_model('vit_tiny_patch16_224')",
    "torchvision": "import torchvision.io, torchvision.ops",
    "an optimizer": (
        "p = torch.nn.Parameter(torch.ones(3)); p.sum().backward()\n"
        "    o = torch.optim.AdamW([p], lr=0.1, fused=True); o.step(); o.zero_grad(); print(p.sum().item() < 3)"
    ),
    "Accelerate": (
        "from accelerate.utils.other import is_compiled_module\n    print(is_compiled_module(torch.nn.Linear(2, 2)))"
    ),
    "checkpointing": (
        "from torch.utils.checkpoint import checkpoint\n"
        "    x = torch.ones(3, requires_grad=True); checkpoint(torch.exp, x, use_reentrant=False).sum().backward()"
    ),
}


@pytest.mark.slow
def test_libraries_that_only_mention_the_compiler_do_not_import_it() -> None:
    after("\n".join(f"with compiler_unloaded():\n    {code}" for code in IMPORTERS.values()))


@pytest.mark.slow
def test_after_the_block_nothing_is_left_of_the_stand_ins() -> None:
    plain = IMPORTERS["an optimizer"]
    code = (
        f"with compiler_unloaded():\n    {plain}\nassert not [name for name in sys.modules if 'torch._dynamo' in name]"
    )
    kept = "torch.optim.Optimizer.zero_grad.__wrapped__"
    after(
        f"{code}\nassert len(sys.meta_path) == before and not hasattr({kept}, '__dynamo_disable')".replace(
            "with", "before = len(sys.meta_path)\nwith", 1
        )
    )


#: What needs the compiler -> code that prints 2.0.
USES = {
    "torch.compile": "f = torch.compile(lambda x: x + 1, backend='eager'); print(f(torch.ones(1)).item())",
    "a module": "import torch._dynamo.config as config; print(2 * config.recompile_limit / config.recompile_limit)",
    "a submodule of a stand-in": "from torch._dynamo.utils import counters; print(2.0 + len(counters))",
    "an attribute": "torch._dynamo.reset(); print(2.0)",
    "a name kept from before": "print(2.0 if kept.reset() is None else 0)",
}


@pytest.mark.slow
@pytest.mark.parametrize("use", USES)
def test_what_needs_the_compiler_gets_it_within_the_block(use: str) -> None:
    """And every module of it once, under its own name."""
    code = f"with compiler_unloaded():\n    kept = torch._dynamo\n    {USES[use]}\n"
    same = "import torch._dynamo.config, torch._dynamo.utils as u\nassert u is sys.modules['torch._dynamo'].utils\n"
    spec = "assert torch._dynamo.config.__spec__.loader.__class__.__name__ == 'SourceFileLoader'\n"
    assert after(code + same + spec, real=True) == "2.0"


@pytest.mark.slow
def test_functions_called_before_the_compiler_was_needed_are_kept_out_of_graphs_again() -> None:
    kept = "torch.optim.Optimizer.zero_grad.__wrapped__"
    code = f"with compiler_unloaded():\n    {IMPORTERS['an optimizer']}\n    assert {kept}.__dynamo_disable is {kept}\n"
    code += f"    torch._dynamo.reset()\n    o.zero_grad()\n    assert {kept}.__dynamo_disable is not {kept}"
    after(code, real=True)


@pytest.mark.slow
def test_a_module_compiled_later_is_recognized_by_those_who_asked_earlier() -> None:
    code = "with compiler_unloaded():\n    from torch._dynamo.eval_frame import OptimizedModule\n"
    code += "    m = torch.compile(torch.nn.Linear(2, 2), backend='eager'); print(isinstance(m, OptimizedModule))"
    assert after(code, real=True) == "True"


def test_blocks_can_be_nested_and_a_loaded_compiler_stays() -> None:
    import torch

    from uvim_fsq.compilation import compiler_unloaded

    loaded: Any = torch._dynamo.config
    with compiler_unloaded(), compiler_unloaded():
        assert torch._dynamo.config is loaded
    assert sys.modules["torch._dynamo.config"] is loaded

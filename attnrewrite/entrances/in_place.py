"""`set_attention_backend`: compiles a model in place, as `torch.nn.Module.compile` does. `reset_attention_backend` undoes it.

A compiled module calls the function in its attribute `_compiled_call_impl`, which PyTorch leaves out of copies and pickles.
attnrewrite changes this attribute and nothing else: `forward`, parameters, hooks, the state dict and the class stay.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module

from ..graphs.inner_compilers import Inner
from ..graphs.modules import UNSET, implementation_of, named, plain_call, restore_implementation, set_implementation
from ..kernels.flags import are_flags
from ..parallel.settings import ContextParallel
from .choices import Choice, CompileSettings, Rules
from .compilers import AttentionCompiler, with_backend
from .contexts import with_rules
from .model_parts import _components, _join, _known, parts
from .schedules import Progress, Schedule
from .strictness import without_modules
from .treatments import treatment

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Unpack


@dataclass
class SetModel:
    """What `set_attention_backend` changed in a model. The functions that it placed hold it, so a model whose blocks are
    compiled has no mark itself: others (peft's `enable_lora_hotswap`) take one for a compiled model."""

    root: weakref.ref[Module]
    before: list[tuple[Module, Any]] = field(default_factory=list)  # changed module, earlier implementation
    placed: list[Any] = field(default_factory=list)  # the new implementations of these modules

    def place(self, module: Module, implementation: Callable[..., Any] | None, as_one: bool = True) -> None:
        """as_one: the implementation compiles the module as one, and no part of it by itself."""
        if implementation is not None:
            if not isinstance(implementation, FunctionType):  # a bound method, where torch.compile is disabled
                implementation = functools.partial(implementation)
            setattr(implementation, _OWNER, self)
            setattr(implementation, _AS_ONE, as_one)
            _SET.add(module)
        self.before.append((module, implementation_of(module, UNSET)))
        self.placed.append(implementation)
        set_implementation(module, implementation)

    def undo(self) -> None:
        """Puts back the earlier implementations. A module that was compiled anew since then stays as it is."""
        for (module, before), placed in zip(reversed(self.before), reversed(self.placed), strict=True):
            if implementation_of(module, UNSET) is placed:
                restore_implementation(module, before)


_OWNER, _AS_ONE = "attnrewrite_set_model", "attnrewrite_as_one"  # attributes of a placed function
_SET: weakref.WeakSet[Module] = weakref.WeakSet()  # modules that got a function, which some have lost since


def _owner(module: Module) -> SetModel | None:
    return getattr(implementation_of(module), _OWNER, None)


def set_attention_backend(
    model: Any,
    *choices: Choice | AttentionCompiler | Schedule,
    components: Iterable[str] | None = None,
    regional: bool | None = None,
    rules: Rules | None = None,
    inner: Inner = "inductor",
    context_parallel: ContextParallel | DeviceMesh | None = None,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    **settings: Unpack[CompileSettings],
) -> AttentionCompiler:
    """Compiles a model in place with other attention kernels. `reset_attention_backend` undoes it.

        backend = attnrewrite.set_attention_backend(pipe, "_flash_3_hub", "native")

    model: a `torch.nn.Module`, or a diffusers pipeline, whose denoiser is compiled (`transformer`, `transformer_2`, `unet`).
    choices: as in `with_backend`; or one `schedule(...)`; or one object from `with_backend`, whose own settings then apply.
    components: names of the pipeline's parts to compile instead: ["transformer", "text_encoder", "vae"]. If a part is called
        by its `encode` and `decode` (a VAE), its encoder and decoder are compiled.
    regional: True compiles the repeated blocks, which share one compilation, instead of the whole model: attention outside of
        the blocks stays unchanged. None: True for a model that declares `_repeated_blocks`, as diffusers' models do.
    rules, inner, context_parallel, and the settings (strict, numerics, cast, trust_remote_code, checks): as in
        `with_backend`. Module paths begin at `model`, also in regional compilation, and in a pipeline with the component's
        name. Blocks that the rules treat alike share a compilation and are reported under the first block.
    fullgraph, dynamic, mode, options: as in torch.compile.

    Returns the backend object, whose `report` shows each attention and its kernel. Nothing is compiled before the first call.
    A model that was set before is reset first. A model that was compiled otherwise (`model.compile()`) is so again after the
    reset. Copies and unpickled models are uncompiled, as always after `torch.nn.Module.compile`.

    Raises `TypeError` for a model that is neither module nor pipeline, `ValueError` for an unknown component, for
    `regional=True` without repeated blocks, for a part of what was set as one and, under `strict`, for a rule that
    matches no module (without it, a warning), and the errors of `with_backend`. The model is then unchanged.
    """
    given = {"regional": regional, "fullgraph": fullgraph, "dynamic": dynamic}
    are_flags(**{name: value for name, value in given.items() if value is not None})
    plan = choices[0] if len(choices) == 1 and isinstance(choices[0], Schedule) else None
    if len(choices) == 1 and isinstance(choices[0], AttentionCompiler):
        compiler = choices[0]
        if rules is not None or inner != "inductor" or context_parallel is not None or settings:
            raise TypeError(
                "set_attention_backend got a backend object and rules, inner or settings beside it: "
                "give them to with_backend, which makes the object"
            )
    else:
        chosen: Any = choices if plan is None else plan.middle
        compiler = with_backend(*chosen, rules=rules, inner=inner, context_parallel=context_parallel, **settings)
        if plan is not None and rules is not None:
            plan = replace(plan, edge=with_rules(plan.edge, compiler.policy.rules))
    roots = parts(model, components)
    _refuse_inside(roots.values())
    progress = Progress(plan, None if isinstance(model, Module) else model) if plan is not None else None
    if any(path or _blocks(path, root, regional) for path, root in roots.items()):
        _check_rules(compiler, roots)
    compile_parts(roots, compiler, regional, progress, fullgraph=fullgraph, dynamic=dynamic, mode=mode, options=options)
    return compiler


def _check_rules(compiler: AttentionCompiler, roots: Mapping[str, Module]) -> None:
    """Warns of rules that match no module; under strict it raises `ValueError`."""
    found = without_modules(compiler.policy, roots)
    lines = [f"rules: {pattern!r} matches no module of this model; {remedy}" for pattern, remedy in found.items()]
    if lines and compiler.policy.strict:
        raise ValueError("strict=True, and " + "\n".join(lines))
    compiler.report.unmatched_rules[:] = found
    for line in lines:
        warnings.warn(line, stacklevel=3)


def compile_parts(
    roots: Mapping[str, Module],
    compiler: AttentionCompiler,
    regional: bool | None = None,
    progress: Progress | None = None,
    **how: Any,
) -> None:
    """Compiles modules in place, as `set_attention_backend` does. roots: by path. how: arguments of torch.compile."""
    blocks = {path: _blocks(path, root, regional) for path, root in roots.items()}
    made = {path: _compiled(path, root, blocks[path], compiler, how) for path, root in roots.items()}

    for path, root in roots.items():
        _undo(root)
        call, of_blocks = made[path]
        model = SetModel(weakref.ref(root))
        for module in list(root.modules()):
            # A module that the user compiled would run the blocks inside it by the user's compiler: the module is uncompiled
            # here. A compiled module inside a block is traced by Dynamo as it is, and one beside the blocks stays as it is.
            if implementation_of(module) is not None and _holds_any(module, of_blocks):
                model.place(module, None)
        for block, implementation in of_blocks:
            model.place(block, implementation)
        if progress is not None:
            model.place(root, _stepped(call, progress), as_one=not of_blocks)
        elif not of_blocks:
            model.place(root, call)


def _stepped(call: Callable[..., Any], progress: Progress) -> Callable[..., Any]:
    def next_step(*args: Any, **kwargs: Any) -> Any:
        with progress.next_call():
            return call(*args, **kwargs)

    return next_step


def _refuse_inside(roots: Iterable[Module]) -> None:
    """Raises `ValueError` for a part of a module that was compiled in place as one: Dynamo would trace through the part."""
    for outer in [module for module in _SET if getattr(implementation_of(module), _AS_ONE, False)]:
        inside = {id(module): path for path, module in named(outer) if module is not outer}
        path = next((inside[id(root)] for root in roots if id(root) in inside), None)
        if path is not None:
            kind = type(outer).__name__
            raise ValueError(
                f"model is {path!r} of a {kind} that set_attention_backend compiles as one, so choices for this part would be "
                f"ignored. Set the {kind} with rules that name the part, or reset it first"
            )


def _holds_any(module: Module, blocks: list[tuple[Module, Any]]) -> bool:
    inside = {id(part) for part in module.modules() if part is not module}
    return any(id(block) in inside for block, _ in blocks)


def reset_attention_backend(model: Any, components: Iterable[str] | None = None) -> None:
    """Undoes `set_attention_backend`: restores the callables that the model had before.

        attnrewrite.reset_attention_backend(pipe)

    model: a module or a pipeline. If it was not set, it stays as it is.
    components: names of the pipeline's parts to reset. None: all of them.

    Raises `TypeError` for a model that is neither module nor pipeline, `ValueError` for an unknown component.
    """
    if isinstance(model, Module):
        roots = [model]
    else:
        named = _components(model)
        roots = [named[name] for name in (named if components is None else _known(components, named))]
    for root in roots:
        _undo(root)


def _undo(root: Module) -> None:
    inside = {id(module): index for index, module in enumerate(root.modules())}

    def place(owner: SetModel) -> int:
        home = owner.root()
        return -1 if home is None else inside.get(id(home), -2)

    while True:
        owners = [owner for module in root.modules() if (owner := _owner(module)) is not None and place(owner) > -2]
        if not owners:
            return
        max(owners, key=place).undo()  # parts first: a part may have been set after its model


def _blocks(path: str, root: Module, regional: bool | None) -> dict[str, Module]:
    """The repeated blocks by their paths from `root`; {} if `root` is compiled as a whole."""
    declared = getattr(root, "_repeated_blocks", None) or ()
    found = {name: module for name, module in named(root) if name and type(module).__name__ in declared}
    if regional and not found:
        raise ValueError(
            f"regional=True, and {_join(path, type(root).__name__)} has none of the repeated blocks it declares "
            f"(_repeated_blocks is {list(declared)}): leave regional out to compile it as a whole"
        )
    return found if regional or regional is None else {}


def _compiled(
    path: str, root: Module, blocks: Mapping[str, Module], compiler: AttentionCompiler, how: Mapping[str, Any]
) -> tuple[Callable[..., Any], list[tuple[Module, Any]]]:
    """Returns the function that the root is to call, and each block with the function that the block is to call."""

    def part(prefix: str, *sharing: str) -> AttentionCompiler:
        return AttentionCompiler(
            compiler.policy,
            compiler.inner,
            compiler.machine,
            prefix=prefix,
            report=compiler.report,
            context_parallel=compiler.context_parallel,
            sharing=sharing,
        )

    if not blocks:
        return torch.compile(plain_call(root), backend=part(path) if path else compiler, **how), []
    alike: dict[Any, dict[str, Module]] = {}
    for name, block in blocks.items():
        full = _join(path, name)
        alike.setdefault((type(block), treatment(compiler.policy, full, block)), {})[full] = block
    made = []
    for members in alike.values():
        backend = part(next(iter(members)), *members)
        made += [(block, torch.compile(plain_call(block), backend=backend, **how)) for block in members.values()]
    return plain_call(root), made

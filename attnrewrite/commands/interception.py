"""The patches that `attnrewrite run` applies in its process: to torch.compile, diffusers' pipelines and SDPA (to count calls).

The rest of attnrewrite does not patch them. `attnrewrite run` owns its process, and only patches reach an unedited script.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch.nn import Module

from ..entrances import in_place, model_parts
from ..entrances.compilers import AttentionCompiler
from ..entrances.strictness import without_sites
from ..graphs.inner_compilers import NAME, known_compilers
from ..graphs.modules import drop_implementation, implementation_of, plain_call, set_implementation
from ..graphs.nodes import is_fake
from ..parallel.settings import ContextParallel
from ..planning.policies import Policy
from ..planning.tables import count
from ..reports.report import Report

PIPELINES = "diffusers.pipelines.pipeline_utils"


@dataclass
class Interception:
    """The state of one process of `attnrewrite run`.

    compile: "existing": only the models that the script compiles; "denoiser", "all": also the denoisers, or all models, of
        diffusers' pipelines.
    """

    policy: Policy  # choices, rules and settings of the command line
    compile: str = "existing"
    inner: str = "inductor"  # the compiler for models of pipelines that the script does not compile
    context_parallel: ContextParallel | None = None  # the processes that share each compiled model
    report: Report = field(init=False)  # of all compilations
    calls: int = 0  # torch.compile calls of the script
    parts: list[str] = field(default_factory=list)  # models of pipelines, compiled here at their first call
    left: list[str] = field(default_factory=list)  # models of pipelines that the script compiles itself
    outside: Counter[tuple[str, int, str]] = field(default_factory=Counter)  # SDPA calls in no graph, by place

    def __post_init__(self) -> None:
        self.report = Report(str(self.policy))
        self._compilers: dict[Any, AttentionCompiler] = {}

    def compiler(self, inner: Any) -> AttentionCompiler:
        if inner not in self._compilers:
            self._compilers[inner] = AttentionCompiler(
                self.policy, inner, report=self.report, context_parallel=self.context_parallel, watch=False
            )
        return self._compilers[inner]

    def install(self) -> None:
        torch.compile = self._compile(torch.compile)
        functional: Any = torch.nn.functional
        functional.scaled_dot_product_attention = self._counted(functional.scaled_dot_product_attention)
        if self.compile != "existing":
            after_import(PIPELINES, self._watch_pipelines)

    # -- torch.compile

    def _compile(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def compile(model: Any = None, **kwargs: Any) -> Any:
            backend = kwargs.get("backend", "inductor")
            if kwargs.get("disable") or not self._takes(backend):
                return original(model, **kwargs)
            if model is None:  # torch.compile(dynamic=True) as a decorator
                return functools.partial(compile, **kwargs)
            if isinstance(model, Module) and isinstance(implementation_of(model), FirstCall):
                drop_implementation(model)  # the script compiles this model itself
            self.calls += 1
            return original(model, **{**kwargs, "backend": self.compiler(backend)})

        return compile

    def _takes(self, backend: Any) -> bool:
        """Whether to wrap a backend: not attnrewrite's own, and no unknown name, for which PyTorch raises its own error."""
        if isinstance(backend, str):
            return backend != NAME and backend in known_compilers()
        return callable(backend) and not isinstance(backend, AttentionCompiler)

    # -- attention outside of compiled graphs

    def _counted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Any:
            # While Dynamo traces, this condition is the constant False, so that only the call below is traced. A fake
            # tensor means that attnrewrite itself is rewriting a graph.
            if not torch.compiler.is_compiling() and not any(is_fake(value) for value in args[:1]):
                frame = sys._getframe(1)
                self.outside[frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name] += 1
            return original(*args, **kwargs)

        return scaled_dot_product_attention

    # -- diffusers' pipelines

    def _watch_pipelines(self, module: ModuleType) -> None:
        pipeline = module.DiffusionPipeline
        original = pipeline.__setattr__

        @functools.wraps(original)
        def set_attribute(pipe: Any, name: str, value: Any) -> None:
            original(pipe, name, value)
            if isinstance(value, Module) and (self.compile == "all" or name in model_parts.DENOISERS):
                self._arm(name, value)

        pipeline.__setattr__ = set_attribute

    def _arm(self, name: str, module: Module) -> None:
        if hasattr(module, "_orig_mod"):
            return
        for path, part in model_parts.called_parts(name, module):
            if implementation_of(part) is None:
                set_implementation(part, FirstCall(self, path, part))

    # -- the report

    def to_json(self, **about: Any) -> str:
        self._known_rules()
        places = [
            {"file": file, "line": line, "function": function, "calls": calls}
            for (file, line, function), calls in self.outside.most_common()
        ]
        data = {
            "version": 1,
            **about,
            "backend": str(self.policy),
            "compile": self.compile,
            "compile_calls": self.calls,
            "compiled_parts": self.parts,
            "parts_compiled_by_the_script": self.left,
            "attention": self.report.to_dict(),
            "outside": {"calls": self.outside.total(), "places": places},
        }
        return json.dumps(data, indent=1)

    def _known_rules(self) -> None:
        """Notes the rules that matched no attention of any compiled model."""
        if self.report.sites:
            self.report.unmatched_rules[:] = without_sites(self.policy, self.report.sites)

    def __str__(self) -> str:
        self._known_rules()
        what = [f"{count(self.calls, 'call')} of torch.compile"] if self.calls else []
        what += [f"{', '.join(dict.fromkeys(self.parts))} of diffusers' pipelines"] if self.parts else []
        lines = [f"attnrewrite run: compiled: {' and '.join(what) or 'nothing'}"]
        if not what:
            lines[0] += f", so nothing has changed. {self._remedy()}"
        for part in dict.fromkeys(self.left):
            lines.append(f"{part}: left to the script, which compiles it itself")
        if self.report.graphs:
            lines.append(str(self.report))
        elif what:
            lines.append("no compiled graph has run")
        lines.append(f"attention outside of any compiled graph: {count(self.outside.total(), 'call')}")
        places = self.outside.most_common()
        lines += [f"    {calls:6d}  {file}:{line} in {function}" for (file, line, function), calls in places[:10]]
        if len(places) > 10:
            lines.append(f"            and {len(places) - 10} places more")
        return "\n".join(lines)

    def _remedy(self) -> str:
        if self.compile == "existing":
            return (
                "The script calls no torch.compile; --compile denoiser compiles the denoisers of diffusers' pipelines"
            )
        return "The script calls neither torch.compile nor a diffusers pipeline"


class FirstCall:
    """Compiles a module at its first call. Until then it stands in for the module's compiled call."""

    def __init__(self, run: Interception, path: str, module: Module) -> None:
        self.run, self.path, self.module = run, path, module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the script compiles a module that calls this one
            return plain_call(self.module)(*args, **kwargs)
        drop_implementation(self.module)
        if any(implementation_of(part) is not None for part in self.module.modules()):
            self.run.left.append(self.path)
        else:
            in_place.compile_parts({self.path: self.module}, self.run.compiler(self.run.inner))
            self.run.parts.append(self.path)
        return self.module(*args, **kwargs)


def after_import(name: str, then: Callable[[ModuleType], None]) -> None:
    """Calls `then(module)` after the module is imported, or at once if it is imported already."""
    if name in sys.modules:
        then(sys.modules[name])
        return

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
            if fullname != name:
                return None
            sys.meta_path.remove(self)
            spec = importlib.machinery.PathFinder.find_spec(fullname, path)
            if spec is not None and spec.loader is not None:
                loader: Any = spec.loader
                execute = loader.exec_module

                def execute_and(module: ModuleType) -> None:
                    execute(module)
                    then(module)

                loader.exec_module = execute_and
            return spec

    sys.meta_path.insert(0, Finder())

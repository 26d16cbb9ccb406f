"""Decides whether a kernel may take a call, and why not: one list of reasons for all kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from ..graphs.questions import Attempt
from ..graphs.sizes import UnbackedSizeError, described, holds
from ..kernels.calls import AttentionCall, Mask, MaskKind
from ..kernels.decisions import Accepted, Code, Decision, Refused, Step
from ..kernels.machines import Machine, is_machine, satisfies
from ..kernels.records import Backend, Numerics

CASTABLE = frozenset({"float16", "bfloat16", "float32", "float64"})


def decide(
    backend: Backend,
    call: AttentionCall,
    machine: Machine,
    limit: Numerics = Numerics.REORDERED,
    cast: str | None = None,
) -> Decision:
    """Whether `backend` may take `call` on `machine` under the numerics `limit`.

    cast: the dtype ("bfloat16") that the call may be cast to if the kernel does not take the call's own dtype.

    Stops at the first refusal. Static facts come first, questions about sizes last, because a question about a symbolic
    size becomes a guard (see `holds`).
    """
    is_machine(machine)
    numerics = backend.numerics
    if not call.is_sdpa:
        numerics = max(numerics, Numerics.REORDERED)  # no kernel keeps the order of the model's operations
    if numerics > limit:
        return Refused(
            Code.NUMERICS,
            f"{backend.name} is {numerics.word}, the limit is {limit.word}",
            f'Pass numerics="{numerics.word}" if that is acceptable',
        )
    steps: tuple[Step, ...] = ()
    if cast in backend.dtypes and call.dtype in CASTABLE - backend.dtypes:
        steps = (Step("cast", call.dtype, cast),)
        call = cast_to(cast, call)
    try:
        first: Refused | None = None
        for mask_as, mask in masks_for(backend, call.mask):
            asked, attempt = replace(call, mask=mask), Attempt()
            if (refused := _refusal(backend, asked, machine)) is None:
                own = backend.steps(asked) if backend.steps else ()
                return Accepted(steps + _paddings(backend, asked) + own, mask_as)
            attempt.forget()
            first = first or refused
        assert first is not None  # `masks_for` gives at least one way
        return first
    except UnbackedSizeError as error:
        return Refused(
            Code.UNBACKED,
            f"the condition {error} depends on the data of a tensor, so no guard can check it",
            "Give the size a bound with torch._check, or keep SDPA here",
        )


def masks_for(backend: Backend, mask: Mask) -> Iterator[tuple[str, Mask]]:
    """How a kernel may receive a mask, the best way first. Knowing more about a mask never excludes a kernel.

    "proven": the kind that the graph proves, with a boolean tensor if the kind needs one; an additive mask stays additive.
    "keys": padding of queries and keys as key padding; the output rows of padded queries are set to zero after the kernel.
    "boolean": the proven keys as any boolean mask, where the model's additive tensor would lose gradients.
    "given": the model's own tensor.
    """
    has = backend.masks
    causal = mask.is_causal and bool(has & {MaskKind.CAUSAL_UPPER_LEFT, MaskKind.CAUSAL_LOWER_RIGHT})
    if mask.kind in has or causal or mask.given is None or mask.given.kind is mask.kind:
        yield "proven", mask if mask.kind is MaskKind.ADDITIVE else mask.bare
    elif mask.kind is MaskKind.QUERY_KEY_PADDING and MaskKind.KEY_PADDING in has:
        yield "keys", replace(mask.bare, kind=MaskKind.KEY_PADDING)
    elif mask.low_rows and mask.is_boolean and MaskKind.BOOLEAN in has:
        yield "boolean", replace(mask.bare, kind=MaskKind.BOOLEAN)
    elif mask.given.kind not in has:
        yield "proven", mask  # the refusal then names the proven kind
    if mask.given is not None and mask.given.kind is not mask.kind and mask.given.kind in has:
        yield "given", mask.given


def _refusal(backend: Backend, call: AttentionCall, machine: Machine) -> Refused | None:
    for reason in REASONS:
        if (refused := reason(backend, call, machine)) is not None:
            return refused
    for check in backend.checks:
        if (refused := check(call, machine)) is not None:
            return refused
    return _batch(backend, call, machine)  # last: checks hold static facts too


def cast_to(dtype: str, call: AttentionCall) -> AttentionCall:
    """The call with its tensors, an additive mask included, cast to `dtype`."""
    mask = call.mask if call.mask.dtype in (None, "bool") else replace(call.mask, dtype=dtype)
    return replace(call, dtype=dtype, mask=mask)


def _paddings(backend: Backend, call: AttentionCall) -> tuple[Step, ...]:
    """The steps that pad head_dim and value_dim with zeros to the multiple that the kernel needs: zeros change no product."""
    multiple = backend.head_dim.multiple
    if not backend.head_dim.pad:
        return ()
    sizes = {"pad_head_dim": call.head_dim, "pad_value_dim": call.value_dim}
    return tuple(
        Step(name, size, size + multiple - size % multiple)
        for name, size in sizes.items()
        if not holds(size % multiple == 0)
    )


def _device(backend: Backend, call: AttentionCall, machine: Machine) -> Refused | None:
    if machine.device in backend.devices:
        return None
    wanted = " or ".join(sorted(backend.devices))
    return Refused(
        Code.DEVICE, f"{backend.name} runs on {wanted}, the call is on {machine.device}", f"Move the model to {wanted}"
    )


def _packages(backend: Backend, call: AttentionCall, machine: Machine) -> Refused | None:
    for package, specifier in backend.requires.items():
        found = machine.packages.get(package)
        install = backend.install.get(package, f'pip install "{package}{specifier}"')
        if not machine.here:  # a description, which nothing that is installed here changes
            install = "Add the version to the packages of the machine, if that machine has it"
        if found is None:
            where = "installed" if machine.here else "among the packages of the machine"
            detail = f"{backend.name} needs {package}{specifier}, which is not {where}"
            return Refused(Code.MISSING, detail, install)
        if not satisfies(found, specifier):
            return Refused(Code.VERSION, f"{backend.name} needs {package}{specifier}, found {found}", install)
    return None


def _capability(backend: Backend, call: AttentionCall, machine: Machine) -> Refused | None:
    if backend.capability is None or machine.capability is None:
        return None
    first, last = backend.capability
    if first <= machine.capability <= last and machine.capability not in backend.not_on:
        return None
    gaps = ", ".join(f"{major}.{minor}" for major, minor in sorted(backend.not_on) if first <= (major, minor) <= last)
    without = f" without {gaps}" if gaps else ""
    return Refused(
        Code.CAPABILITY,
        f"{backend.name} runs on compute capability {first[0]}.{first[1]} to {last[0]}.{last[1]}{without}, "
        f"this is {machine.capability[0]}.{machine.capability[1]}",
        "Choose a kernel made for this GPU",
    )


def _context(backend: Backend, call: AttentionCall, machine: Machine) -> Refused | None:
    if call.obstacle is None or (backend.any_context and call.is_sdpa):
        return None  # `native` leaves a call as it is, but it would replace any other attention
    return Refused(Code.CONTEXT, call.obstacle, "The call stays as it is in the model, and its result does not change")


def _exported(backend: Backend, call: AttentionCall, machine: Machine) -> Refused | None:
    if not call.exported or not backend.not_exported:
        return None
    return Refused(
        Code.CONTEXT,
        f"{backend.name} cannot be part of an exported program: {backend.not_exported}",
        "Choose another kernel, or compile with torch.compile",
    )


def _deterministic(backend: Backend, call: AttentionCall, machine: Machine) -> Refused | None:
    if backend.deterministic or not call.deterministic:
        return None
    return Refused(
        Code.DETERMINISTIC,
        f"{backend.name} is not deterministic and torch.use_deterministic_algorithms(True) is on",
        "Turn deterministic algorithms off, or choose another kernel",
    )


def _in_cuda_graph(backend: Backend, call: AttentionCall, machine: Machine) -> Refused | None:
    if backend.capturable or not call.in_cuda_graph:
        return None
    return Refused(
        Code.CAPTURE,
        f"{backend.name} cannot be recorded in a CUDA graph, and this compilation records one",
        'Compile without CUDA graphs (mode="default", "max-autotune-no-cudagraphs"), or choose another kernel',
    )


def _dtype(backend: Backend, call: AttentionCall, machine: Machine) -> Refused | None:
    if call.dtype in backend.dtypes:
        return None
    wanted = ", ".join(sorted(backend.dtypes))
    return Refused(
        Code.DTYPE,
        f"{backend.name} takes {wanted}, the call is {call.dtype}",
        f'Run the model in {wanted}, or under autocast; or pass cast="bfloat16" if that is exact enough',
    )


def _dropout(backend: Backend, call: AttentionCall, machine: Machine) -> Refused | None:
    if backend.dropout or call.dropout == 0:
        return None
    return Refused(
        Code.DROPOUT,
        f"{backend.name} has no dropout, the call has p={call.dropout:g}",
        "Call model.eval(), or set dropout to 0",
    )


def _grad(backend: Backend, call: AttentionCall, machine: Machine) -> Refused | None:
    if call.needs_grad and not backend.backward:
        return Refused(
            Code.GRAD,
            f"{backend.name} has no backward on {machine.device}, the call needs a gradient",
            "Run under torch.no_grad(), or choose another kernel for training",
        )
    if call.mask.needs_grad and not backend.mask_grad:
        return Refused(
            Code.GRAD,
            f"{backend.name} gives no gradient to the mask, which needs one",
            "Detach the mask if it is not learned",
        )
    return None


def _logsumexp(backend: Backend, call: AttentionCall, machine: Machine) -> Refused | None:
    if not call.logsumexp or backend.logsumexp is not None or (backend.any_context and call.is_sdpa):
        return None  # `native` leaves the step as it is
    return Refused(
        Code.CONTEXT,
        f"{backend.name} does not return the log-sum-exp of the scores, which a ring of keys and values reads",
        'Give ContextParallel the kind "ulysses" or "gather", or choose native or _native_cudnn here',
    )


def _mask(backend: Backend, call: AttentionCall, machine: Machine) -> Refused | None:
    kind = call.mask.kind
    if call.mask.is_causal and backend.masks & {MaskKind.CAUSAL_UPPER_LEFT, MaskKind.CAUSAL_LOWER_RIGHT}:
        return None  # `_causal` compares the alignments last, because that is a question about sizes
    if kind not in backend.masks:
        taken = ", ".join(sorted(word.value for word in backend.masks if word is not MaskKind.NONE)) or "no mask"
        fix = "Add a kernel that takes this mask as the next choice"
        if call.mask.if_boolean in backend.masks:
            fix = f"If the model's mask holds only 0 and 1, pass it as torch.bool: then it is {call.mask.if_boolean.value}"
        return Refused(Code.MASK, f"{backend.name} takes {taken}, the call has a mask: {call.mask}", fix)
    dtype = call.mask.dtype
    if kind is MaskKind.ADDITIVE and dtype != call.dtype and dtype not in backend.mask_dtypes:
        return Refused(
            Code.MASK,
            f"{backend.name} takes an additive mask in {' or '.join(sorted({call.dtype, *backend.mask_dtypes}))}, "
            f"the call's mask is {dtype}",
            f"Cast the mask to {call.dtype}, if that is exact enough",
        )
    return backend.mask_check(call, machine) if backend.mask_check is not None else None


def _low_rows(backend: Backend, call: AttentionCall, machine: Machine) -> Refused | None:
    """A kernel's backward computes the weights of a row anew from the log-sum-exp of its scores, which is rounded beside a
    large number: weights of 1 instead of 1 / kv_len."""
    low = call.needs_grad and call.mask.low_rows and call.mask.kind is MaskKind.ADDITIVE
    if not low or backend.all_scores or (backend.op is None and call.is_sdpa):
        return None
    return Refused(
        Code.GRAD,
        f"{backend.name} loses the gradient of a row that the additive mask hides as a whole: its backward has only the "
        "log-sum-exp of the scores, not the weights",
        "Pass the mask as torch.bool, or choose _native_math",
    )


def _value_dim(backend: Backend, call: AttentionCall, machine: Machine) -> Refused | None:
    if backend.value_dim or holds(call.value_dim == call.head_dim):
        return None
    return Refused(
        Code.VALUE_DIM,
        f"{backend.name} needs value_dim equal to head_dim, "
        f"value_dim is {described(call.value_dim)} and head_dim {described(call.head_dim)}",
        "Choose a kernel that takes a value_dim other than head_dim",
    )


def _gqa(backend: Backend, call: AttentionCall, machine: Machine) -> Refused | None:
    if backend.gqa or holds(call.heads == call.kv_heads):
        return None
    return Refused(
        Code.GQA,
        f"{backend.name} needs as many key heads as query heads, "
        f"there are {described(call.kv_heads)} and {described(call.heads)}",
        "Choose a kernel with grouped-query attention",
    )


def _head_dim(backend: Backend, call: AttentionCall, machine: Machine) -> Refused | None:
    rule = backend.head_dim
    for name, size in (("head_dim", call.head_dim), ("value_dim", call.value_dim)):
        if rule.max is not None and not holds(size <= rule.max):
            limit = f"up to {rule.max}"
        elif rule.minimum > 1 and not holds(size >= rule.minimum):
            limit = f"from {rule.minimum}"
        elif rule.multiple > 1 and not rule.pad and not holds(size % rule.multiple == 0):
            limit = f"in multiples of {rule.multiple}"
        else:
            continue
        detail = f"{backend.name} takes {name} {limit}, this is {described(size)}"
        return Refused(Code.HEAD_DIM, detail, f"Choose a kernel that takes this {name}")
    return None


def _scale(backend: Backend, call: AttentionCall, machine: Machine) -> Refused | None:
    """Most kernels take the largest score of a row before they scale: with a scale of zero or less they give NaN (on an H200
    cuDNN, FlashAttention 2 to 4, xformers, and SageAttention 1.x with causal)."""
    if backend.any_scale or call.scale is None or call.scale > 0:
        return None
    return Refused(
        Code.SCALE,
        f"{backend.name} takes a scale above 0, this is {call.scale:g}",
        "Choose _native_math, or _native_efficient on a GPU",
    )


def _causal(backend: Backend, call: AttentionCall, machine: Machine) -> Refused | None:
    """Upper-left and lower-right agree only where q_len == kv_len."""
    kind = call.mask.kind
    if not call.mask.is_causal or kind in backend.masks:
        return None
    if holds(call.q_len == call.kv_len):
        return None
    has = "lower-right" if kind is MaskKind.CAUSAL_UPPER_LEFT else "upper-left"
    wants = "upper-left" if kind is MaskKind.CAUSAL_UPPER_LEFT else "lower-right"
    return Refused(
        Code.CAUSAL,
        f"{backend.name} takes causal {has}, the call is causal {wants}, and they differ unless q_len == kv_len: "
        f"q_len is {described(call.q_len)}, kv_len {described(call.kv_len)}",
        "Choose a kernel with the other alignment",
    )


def _batch(backend: Backend, call: AttentionCall, machine: Machine) -> Refused | None:
    """CUDA launches at most 65,535 blocks along the second and third dimension of a grid."""
    if backend.max_batch is None:
        return None
    for name, size in (("heads", call.heads), ("batch", call.batch)):
        if not holds(size <= backend.max_batch):
            return Refused(
                Code.BATCH,
                f"{backend.name} takes {name} up to {backend.max_batch:,}, this is {described(size)}",
                "Choose native or _native_efficient, or call the model with a smaller batch",
            )
    return None


def _length(backend: Backend, call: AttentionCall, machine: Machine) -> Refused | None:
    if backend.empty:
        return None
    for name, size in (("batch", call.batch), ("q_len", call.q_len), ("kv_len", call.kv_len)):
        if not holds(size >= 1):
            return Refused(
                Code.LENGTH,
                f"{backend.name} needs {name} of at least 1, this is {described(size)}",
                "Skip the attention call for an empty tensor",
            )
    return None


def _short(backend: Backend, call: AttentionCall, machine: Machine) -> Refused | None:
    if backend.max_length is None:
        return None
    for name, size in (("q_len", call.q_len), ("kv_len", call.kv_len)):
        if not holds(size <= backend.max_length):
            detail = f"{backend.name} takes {name} up to {backend.max_length}, this is {described(size)}"
            return Refused(Code.LENGTH, detail, "Choose native or _native_efficient")
    return None


# Static facts first, sizes last.
REASONS: tuple[Callable[[Backend, AttentionCall, Machine], Refused | None], ...] = (
    _device,
    _packages,
    _capability,
    _context,
    _exported,
    _deterministic,
    _in_cuda_graph,
    _dtype,
    _dropout,
    _logsumexp,
    _grad,
    _mask,
    _low_rows,
    _scale,
    _value_dim,
    _gqa,
    _head_dim,
    _causal,
    _length,
    _short,
)

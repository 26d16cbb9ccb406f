"""attnrewrite swaps the attention kernels of a PyTorch model inside torch.compile, and says why where it does not."""

from .aot.archives import ProgramFileError
from .aot.blocks import aot_compile_blocks, load_blocks
from .aot.check_ops import AttentionAssertionError
from .aot.files import explain_file, load, retarget, save
from .aot.packages import CHECKS_HEADER, CompiledPackage, LoadedPackage, NeedsPythonError, aot_compile, load_package
from .aot.programs import export, report_of, rewrite
from .calls import AttentionCall, Mask, MaskKind
from .checking import AttentionCheckError
from .compilers import AttentionCompiler, with_backend
from .decisions import Accepted, Code, Decision, Refused, Step
from .explaining import explain
from .fidelity import check
from .fidelity_report import Fidelity, SiteFidelity
from .in_place import reset_attention_backend, set_attention_backend
from .machines import Machine, machine_of
from .measurements import Measurement
from .plans import AttentionRefusedError, Plan, Site, Tuning, make_plan
from .policies import Policy, make_policy
from .reasons import decide
from .records import Backend, HeadDim, Numerics, Tolerance
from .registry import names, records_of
from .reports import Report
from .schedules import Schedule, schedule
from .sizes import UnbackedSizeError, holds
from .sources import Hub, Package
from .stacking import inductor_pass
from .switching import attention_backend
from .tuning import tune

__version__ = "0.1.0"

__all__ = [
    "CHECKS_HEADER",
    "Accepted",
    "AttentionAssertionError",
    "AttentionCall",
    "AttentionCheckError",
    "AttentionCompiler",
    "AttentionRefusedError",
    "Backend",
    "Code",
    "CompiledPackage",
    "Decision",
    "Fidelity",
    "HeadDim",
    "Hub",
    "LoadedPackage",
    "Machine",
    "Mask",
    "MaskKind",
    "Measurement",
    "NeedsPythonError",
    "Numerics",
    "Package",
    "Plan",
    "Policy",
    "ProgramFileError",
    "Refused",
    "Report",
    "Schedule",
    "Site",
    "SiteFidelity",
    "Step",
    "Tolerance",
    "Tuning",
    "UnbackedSizeError",
    "aot_compile",
    "aot_compile_blocks",
    "attention_backend",
    "check",
    "decide",
    "explain",
    "explain_file",
    "export",
    "holds",
    "inductor_pass",
    "load",
    "load_blocks",
    "load_package",
    "machine_of",
    "make_plan",
    "make_policy",
    "names",
    "records_of",
    "report_of",
    "reset_attention_backend",
    "retarget",
    "rewrite",
    "save",
    "schedule",
    "set_attention_backend",
    "tune",
    "with_backend",
]

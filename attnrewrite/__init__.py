"""attnrewrite swaps the attention kernels of a PyTorch model inside torch.compile, and says why where it does not."""

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
    "Accepted",
    "AttentionCall",
    "AttentionCheckError",
    "AttentionCompiler",
    "AttentionRefusedError",
    "Backend",
    "Code",
    "Decision",
    "Fidelity",
    "HeadDim",
    "Hub",
    "Machine",
    "Mask",
    "MaskKind",
    "Measurement",
    "Numerics",
    "Package",
    "Plan",
    "Policy",
    "Refused",
    "Report",
    "Schedule",
    "Site",
    "SiteFidelity",
    "Step",
    "Tolerance",
    "Tuning",
    "UnbackedSizeError",
    "attention_backend",
    "check",
    "decide",
    "explain",
    "holds",
    "inductor_pass",
    "machine_of",
    "make_plan",
    "make_policy",
    "names",
    "records_of",
    "reset_attention_backend",
    "schedule",
    "set_attention_backend",
    "tune",
    "with_backend",
]

"""attnrewrite swaps the attention kernels of a PyTorch model inside torch.compile, and says why where it does not."""

from .aot.archives import ProgramFileError
from .aot.blocks import aot_compile_blocks, load_blocks
from .aot.check_ops import AttentionAssertionError
from .aot.files import explain_file, load, retarget, save
from .aot.packages import CHECKS_HEADER, CompiledPackage, LoadedPackage, NeedsPythonError, aot_compile, load_package
from .aot.portable import portable
from .aot.programs import export, report_of, rewrite
from .entrances.checking import check
from .entrances.choices import make_policy
from .entrances.compilers import AttentionCompiler, with_backend
from .entrances.contexts import attention_backend
from .entrances.explaining import explain
from .entrances.in_place import reset_attention_backend, set_attention_backend
from .entrances.inductor_pass import inductor_pass
from .entrances.plan_doctor import context_parallel_plan
from .entrances.plan_schedules import schedule_of
from .entrances.schedules import Schedule, schedule
from .entrances.tuning import tune
from .entrances.tuning_pipelines import tune_pipeline
from .graphs.sizes import UnbackedSizeError, holds
from .kernels import ops as ops  # for plug-ins: ops.register
from .kernels.calls import AttentionCall, Mask, MaskKind
from .kernels.decisions import Accepted, Code, Decision, Refused, Step
from .kernels.library_kernels import dense_kernel, packed_kernel
from .kernels.machines import Machine
from .kernels.records import Backend, HeadDim, Numerics, Option, Tolerance
from .kernels.sources import Hub, Package
from .parallel.agreement import RanksDisagreeError
from .parallel.boundary_plans import BoundaryPlan
from .parallel.rates import Rates
from .parallel.settings import ContextParallel, DescribedRanks
from .passes.check_values import AttentionCheckError
from .planning.measurements import GivenBack, Measurement, OutputError, Tuning
from .planning.planner import AttentionRefusedError, make_plan
from .planning.plans import Plan
from .planning.policies import Policy
from .planning.reasons import decide
from .planning.registry import names, records_of
from .planning.sites import Site
from .planning.this_machine import machine_of
from .reports.fidelity import Fidelity
from .reports.report import Report
from .reports.site_fidelity import SiteFidelity
from .version import __version__ as __version__

__all__ = [
    "CHECKS_HEADER",
    "Accepted",
    "AttentionAssertionError",
    "AttentionCall",
    "AttentionCheckError",
    "AttentionCompiler",
    "AttentionRefusedError",
    "Backend",
    "BoundaryPlan",
    "Code",
    "CompiledPackage",
    "ContextParallel",
    "Decision",
    "DescribedRanks",
    "Fidelity",
    "GivenBack",
    "HeadDim",
    "Hub",
    "LoadedPackage",
    "Machine",
    "Mask",
    "MaskKind",
    "Measurement",
    "NeedsPythonError",
    "Numerics",
    "Option",
    "OutputError",
    "Package",
    "Plan",
    "Policy",
    "ProgramFileError",
    "RanksDisagreeError",
    "Rates",
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
    "context_parallel_plan",
    "decide",
    "dense_kernel",
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
    "ops",
    "packed_kernel",
    "portable",
    "records_of",
    "report_of",
    "reset_attention_backend",
    "retarget",
    "rewrite",
    "save",
    "schedule",
    "schedule_of",
    "set_attention_backend",
    "tune",
    "tune_pipeline",
    "with_backend",
]

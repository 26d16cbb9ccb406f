"""Ranks that are processes, over gloo on the CPU: all cases of worker.py in one spawn for each number of ranks."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnrewrite.commands import ranks
from attnrewrite.parallel import plans

HERE = Path(__file__).parent


# Starting a process and importing PyTorch takes a while: ATTNREWRITE_SLOW=1 runs three ranks too.
SIZES = [2, 3] if os.environ.get("ATTNREWRITE_SLOW") else [2]


@pytest.fixture(scope="module", params=SIZES, ids="{} ranks".format)
def found(request, tmp_path_factory):
    """What each rank found, case by case."""
    return spawned(request.param, tmp_path_factory.mktemp("ranks"))


def spawned(size, folder, *names):
    """Runs the cases with these names, or all, and returns what each rank found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    places = os.pathsep.join([str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    running, logs = [], [(folder / f"{rank}.log").open("w") for rank in range(size)]
    for rank in range(size):
        known = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **known, "OMP_NUM_THREADS": "1", "PYTHONPATH": places}
        command = [sys.executable, str(HERE / "worker.py"), str(folder / f"{rank}.json"), *names]
        running.append(subprocess.Popen(command, env=environment, stdout=logs[rank], stderr=subprocess.STDOUT))
    try:
        codes = [each.wait(timeout=1500 if os.environ.get("ATTNREWRITE_SLOW") else 500) for each in running]
    finally:
        for each, log in zip(running, logs, strict=True):
            each.kill()
            each.wait()
            log.close()
    said = "\n".join((folder / f"{rank}.log").read_text()[-3000:] for rank in range(size))
    assert codes == [0] * size, said
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


def case(found, name):
    """What the ranks found in one case."""
    results = [each[name] for each in found]
    for result in results:
        assert "failed" not in result, result["failed"]
    return results


SHARED = {
    "tokens": plans.ALL_TO_ALL,
    "uneven": plans.ALL_TO_ALL,
    "a_mask": plans.ALL_TO_ALL,
    "gathered": plans.KEYS_GATHERED,
    "batch": plans.BATCH,
    "inductor": plans.ALL_TO_ALL,
}


@pytest.mark.parametrize("name", SHARED)
def test_every_rank_gets_what_one_process_gets(found, name):
    for result in case(found, name):
        assert result["error"] < 1e-12
        assert result["exchanges"] == [SHARED[name]]
        assert result["chosen"] == ["native"]
        assert result["heads"] == [6 // len(found) if SHARED[name] == plans.ALL_TO_ALL else 6]
        assert f"context parallelism over {len(found)} ranks" in result["text"]
        assert result["round trip"]


RINGS = {"ring": "native", "ring_with_a_mask": "_native_flash", "causal_ring": "native"}
if os.environ.get("ATTNREWRITE_SLOW"):
    RINGS["ring_by_inductor"] = "native"


@pytest.mark.parametrize("name", RINGS)
def test_a_ring_gives_what_one_process_gets(found, name):
    for rank, result in enumerate(case(found, name)):
        assert result["error"] < 1e-12
        assert result["exchanges"] == [plans.RING]
        steps = rank + 1 if name == "causal_ring" else len(found)
        assert result["chosen"] == [RINGS[name]] * steps
        assert result["heads"] == [6] * steps
        assert result["round trip"]


@pytest.mark.skipif(not os.environ.get("ATTNREWRITE_SLOW"), reason="four processes: ATTNREWRITE_SLOW=1")
def test_a_ring_of_groups_of_ranks(tmp_path):
    for result in case(spawned(4, tmp_path, "ring_of_groups"), "ring_of_groups"):
        assert result["error"] < 1e-12
        assert result["exchanges"] == [plans.GROUPS]
        assert result["heads"] == [3, 3]


def test_symbolic_lengths_are_guarded(found):
    for result in case(found, "dynamic"):
        assert result["error"] < 1e-12
        assert result["graphs"] > 1  # lengths that the ranks divide, and lengths that they do not


def test_blocks_of_a_model(found):
    for result in case(found, "regional"):
        assert result["error"] < 1e-5
        assert result["sharings"]


@pytest.mark.parametrize("name", ["entry_point", "a_context"])
def test_other_ways_in(found, name):
    for result in case(found, name):
        assert result["error"] < 1e-12


TRAINED = {
    "trained_ulysses": ([plans.ALL_TO_ALL, plans.KEYS_WHOLE], 1e-10),
    "trained_gather": ([plans.KEYS_GATHERED, plans.KEYS_WHOLE], 1e-10),
    "two_steps": ([plans.ALL_TO_ALL, plans.KEYS_WHOLE], 1e-10),
}
if os.environ.get("ATTNREWRITE_SLOW"):
    TRAINED |= {
        "trained_dynamic": ([plans.ALL_TO_ALL], 1e-10),
        "trained_joint": ([plans.ALL_TO_ALL], 1e-10),
        "trained_batch": ([plans.BATCH], 1e-10),
        "trained_by_inductor": ([plans.ALL_TO_ALL], 1e-10),
        "trained_flux": ([plans.ALL_TO_ALL], 1e-10),
        "trained_wan": ([plans.KEYS_GATHERED, plans.KEYS_WHOLE], 1e-6),  # some of its norms compute in float32
        "trained_sd3": ([plans.BATCH], 1e-10),
    }


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_are_those_of_one_process(found, name):
    exchanges, tolerance = TRAINED[name]
    for result in case(found, name):
        assert result["error"] < tolerance, result["name"]
        assert not any(result["refused"])
        if len(found) == 2:  # three ranks divide other heads and batches
            assert result["exchanges"] == sorted(exchanges)


def test_what_defines_a_gradient_of_its_own_runs_whole(found):
    for result in case(found, "own_gradients"):
        for name, reason in (
            ("a function", "autograd_function_apply may define"),
            ("a checkpoint", "activation checkpoint"),
        ):
            assert result[name]["error"] < 1e-12
            assert all(reason in each for each in result[name]["refused"])


def test_ranks_that_do_not_all_need_a_gradient_disagree(found):
    for result in case(found, "other_gradients"):
        assert "RanksDisagreeError" in result["raised"]
        assert ", with a gradient" in result["raised"]


def test_all_ranks_choose_what_is_fastest_on_the_slowest(found):
    sites = [[name, "native", 6 // len(found), 12] for name in "01"]
    for rank, result in enumerate(case(found, "tuned")):
        assert result["alone"] == ["native" if rank else "_native_math"] * 2
        assert result["sites"] == sites
        assert result["times"] == {"native": 5.0, "_native_math": 9.0}
        assert result["used"] == [["native", "plan: 5 ms", None]] * 2
        assert result["error"] < 1e-12
    results = case(found, "tuned_by_its_name")
    assert all(result == results[0] for result in results)
    assert [[name, heads] for name, _, heads, _ in results[0]["sites"]] == [
        ["0", 6 // len(found)],
        ["1", 6 // len(found)],
    ]
    assert results[0]["refused"].startswith("max_output_error is 0.1 and context_parallel is given")


def test_all_ranks_choose_alike_at_the_first_compilation(found):
    """Although one of them has forgotten what it has measured."""
    for rank, result in enumerate(case(found, "tuned_on_first_use")):
        assert result["chosen"] == [["native"] * 2] * 2
        assert result["measured"] == (1 if rank else 2)
        assert result["error"] < 1e-12


def test_each_rank_checks_what_it_has(found):
    for rank, result in enumerate(case(found, "checked")):
        right, wrong = result["right"], result["wrong"]
        assert right["sites"] == [[name, 6 // len(found), ""] for name in "01"]
        assert right["output"] < 1e-12
        assert right["right"]
        assert [bool(each) for _, _, each in wrong["sites"]] == [rank == 1] * 2
        assert wrong["output"] > 1e-5
        assert not wrong["right"]  # where no site is, the output is


def test_ranks_that_disagree_raise_on_all_of_them(found):
    for result in case(found, "other_lengths"):
        assert "RanksDisagreeError" in result["raised"]
        assert "(1, 24, 24)" in result["raised"]  # the image of rank 1, or of another that has it longer
    for result in case(found, "other_kernels"):
        assert "RanksDisagreeError" in result["raised"]
        assert "kernel native" in result["raised"]


def test_a_rank_that_fails_ends_the_others(found):
    first, second, *_ = case(found, "one_fails")
    assert "AttentionRefusedError" in second["raised"]
    assert "rank 1 could not compile this graph (context_parallel): AttentionRefusedError" in first["raised"]


def test_a_rank_that_does_not_come_ends_the_wait(found):
    first, *_ = case(found, "one_does_not_come")
    assert "rank 1 has not compiled this graph within 2 s" in first["raised"]


MESSAGES = {
    "two dimensions": "ValueError: context_parallel got a mesh of 2 dimensions",
    "one device": "ValueError: context_parallel got a mesh of one device: leave context_parallel out",
    "no mesh": "TypeError: context_parallel got the mesh 'cuda' (str): give a DeviceMesh",
    "kind": "ValueError: kind is 'sideways': it is one of 'auto', 'ulysses', 'ring', 'ulysses+ring', 'gather'",
    "timeout": "ValueError: timeout is 0: give a number of seconds above 0",
    "beside an object": "TypeError: set_attention_backend got a backend object and",
    "a part of a mesh": "",
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_mesh_that_cannot_be_used(found, name):
    for result in case(found, "bad_meshes"):
        assert result[name].startswith(MESSAGES[name])
        assert MESSAGES[name] or not result[name]


@pytest.mark.skipif(
    not os.environ.get("ATTNREWRITE_SLOW"), reason="two processes that import diffusers: ATTNREWRITE_SLOW=1"
)
def test_a_script_that_nobody_edits(tmp_path):
    script = str(HERE.parents[1] / "examples" / "zero_code" / "plain_script.py")
    alone = subprocess.run([sys.executable, script, "--steps", "2"], capture_output=True, text=True)
    options = ["--backend", "native", "--context-parallel", "--inner", "eager", "--compile", "denoiser"]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "attnrewrite", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    ran = subprocess.run(
        [sys.executable, *command, *options, script, "--steps", "2"], capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout == alone.stdout  # by one rank
    assert ran.stderr.count("context parallelism over 2 ranks, ") == 1


def test_a_script_on_one_process_is_told_how_to_start_more(capsys, monkeypatch):
    from attnrewrite.commands import run

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit):
        run.main(["--backend", "native", "--context-parallel", "script.py"])
    assert "--context-parallel needs several processes: torchrun --nproc-per-node 2" in capsys.readouterr().err


@pytest.mark.parametrize("given", [None, "0"])
def test_nccl_goes_first_unless_its_variable_says_otherwise(monkeypatch, given):
    def joined(device, shape):
        assert (device, shape) == ("cuda", (4,))
        raise InterruptedError(os.environ["TORCH_NCCL_HIGH_PRIORITY"])

    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("TORCH_NCCL_HIGH_PRIORITY", "")  # so that it is as before behind the test
    monkeypatch.delenv("TORCH_NCCL_HIGH_PRIORITY")
    if given:
        monkeypatch.setenv("TORCH_NCCL_HIGH_PRIORITY", given)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.distributed.device_mesh, "init_device_mesh", joined)
    with pytest.raises(InterruptedError, match=given or "1"):
        ranks.joined_ranks()


def test_compiled_code_goes_before_the_group_whose_exchanges_it_holds(monkeypatch):
    done = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: done.append("compiled code"))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: done.append("group"))
    ranks.leave()
    assert done == ["compiled code", "group"]


GRAPHS = """
import torch
layer = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).cuda().eval().requires_grad_(False)
run = torch.compile(layer, mode="reduce-overhead")
for _ in range(4):
    output = run(torch.ones(1, 64, 64, device="cuda")).clone()
print("done", output.shape)
"""


@pytest.mark.gpu
def test_a_script_with_cuda_graphs_ends(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    (tmp_path / "script.py").write_text(GRAPHS)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "attnrewrite", "run"]
    options = ["--backend", "native", "--context-parallel", "--compile", "existing", str(tmp_path / "script.py")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    ran = subprocess.run(
        [sys.executable, *command, *options], capture_output=True, text=True, env=environment, timeout=200
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.startswith("done")
    assert "context parallelism over 2 ranks, " in ran.stderr

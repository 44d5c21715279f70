"""`longctx submit` without Slurm: the script that it renders, and its refusals before it submits a job."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from longctx import cli
from longctx.config.submit import seconds_of
from longctx.run.submit import EXPLAINED, training_words

SCRIPT = Path(__file__).parents[2] / "launch" / "slurm.sbatch"


def dry(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["submit", "launch=slurm", "dry_run=true", *words]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    return said[said.index("#!/usr/bin/env bash") :]  # DeepSpeed logs to standard output when it is imported first


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("90:30", 5430), ("1:30:00", 5400), ("1-2", 93600), ("1-2:03", 93780), ("1-2:03:04", 93784),
     ("0", None), ("UNLIMITED", None), ("infinite", None)],
)  # fmt: skip
def test_a_time_limit_is_read_as_slurm_reads_it(time: str, seconds: int | None) -> None:
    """The formats of sbatch's manual, option --time."""
    assert seconds_of(time) == seconds


@pytest.mark.parametrize("time", ["", "-5", "1d", "1-", "1:2:3:4", "2h", "1-2-3", "1.5", "2:00:00 "])
def test_a_time_limit_that_slurm_does_not_take_is_refused(time: str) -> None:
    with pytest.raises(ValueError, match="is not a time limit of Slurm"):
        seconds_of(time)


def test_the_script_has_options_settings_and_the_training_command(capsys, tmp_path: Path) -> None:
    given = [
        "launch.nodes=4", "launch.account=lab", "launch.partition=gpu", "launch.time=2:00:00",
        "launch.lead_seconds=900",
        "launch.container=registry/torch:25", "launch.mounts=[/data:/data,/shared:/shared]",
        "launch.setup=['module load cuda']", "launch.environment={NCCL_IB_HCA: mlx5, NCCL_DEBUG: INFO, MINE: 'a b'}",
        "launch.sbatch=['--exclusive']", "launch.requeues=3", f"run_dir={tmp_path}/run", "engine.device=cuda",
        "experiment=llama3_8b_1048k", "data=stdlib", "curriculum.stages.s524k.mix=long",
        "curriculum.stages.s1048k.mix=long",
        "accept=[disk,memory]", "model.tokenizer=longctx/assets/tiny", "model.path=MODEL",
    ]  # fmt: skip
    make_model(tmp_path / "MODEL")
    script = dry(capsys, *[word.replace("=MODEL", f"={tmp_path}/MODEL") for word in given])
    lines = script.splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert options[:8] == [
        "--job-name=llama3_8b_1048k", "--nodes=4", "--gpus-per-node=8", "--ntasks-per-node=8", "--cpus-per-task=8",
        "--time=2:00:00", "--account=lab", "--partition=gpu",
    ]  # fmt: skip
    assert options[8:] == [
        "--signal=B:USR1@900", "--requeue", f"--output={tmp_path}/run/logs/%x-%j.log", "--open-mode=append",
        "--exclusive",
    ]  # fmt: skip
    assert "module load cuda" in lines
    assert lines[lines.index("export NCCL_IB_HCA=mlx5") - 1] == f"# {EXPLAINED['NCCL_IB_HCA']}"
    assert "export MINE='a b'" in lines
    srun = next(line for line in lines if line.startswith("export SRUN_OPTIONS="))
    assert "--container-image=registry/torch:25 --container-mounts=/data:/data,/shared:/shared" in srun
    assert f"--output={tmp_path}/run/logs/%x-%j-rank%t.log" in srun
    command = next(line for line in lines if line.startswith("set -- "))
    assert "experiment=llama3_8b_1048k" in command
    assert "launch.requeues=3" in command
    assert not [word for word in ("dry_run", "launch.nodes", "launch=slurm", "launch.setup") if word in command]
    assert script.endswith(SCRIPT.read_text().rpartition("\n#SBATCH ")[2].partition("\n")[2])
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_a_name_and_a_folder_with_spaces_stay_one_option_each(capsys, tmp_path: Path) -> None:
    """Slurm refuses the script otherwise: Invalid directive found in batch script."""
    folder = tmp_path / "my runs"
    script = dry(
        capsys, "experiment=quickstart", "name=my run", f"run_dir={folder}", "launch.gpus_per_node=0",
        "launch.ranks_per_node=2", "launch.sbatch=['--comment=\"two words\"']",
    )  # fmt: skip
    options = [shlex.split(line)[1:] for line in script.splitlines() if line.startswith("#SBATCH ")]
    assert all(len(words) == 1 for words in options)
    given = [words[0] for words in options]
    assert {"--job-name=my run", f"--output={folder}/logs/%x-%j.log", "--comment=two words"} <= set(given)


def make_model(folder: Path) -> None:
    from longctx.config.model import InitConfig
    from longctx.model.load import init_from

    shape = InitConfig(layers=1, hidden=32, heads=2, kv_heads=1, ffn=32, vocab=512, window=8192, theta=500000)
    init_from(shape, dtype="bfloat16").save_pretrained(folder)


def test_a_job_for_each_stage_ends_after_it(capsys, tmp_path: Path) -> None:
    script = dry(
        capsys, "experiment=quickstart", f"run_dir={tmp_path}/run", "launch.per_stage=true", "launch.gpus_per_node=0",
        "launch.ranks_per_node=2", "launch.nodes_by_stage={s8192: 2}",
    )  # fmt: skip
    commands = [line for line in script.splitlines() if line.startswith("set -- ")]
    assert [line.rpartition(" ")[2] for line in commands] == ["launch.until=s2048", "launch.until=s8192"]
    assert [line for line in script.splitlines() if "--nodes=" in line] == ["#SBATCH --nodes=1", "#SBATCH --nodes=2"]
    assert "--gpus-per-node" not in script
    assert f"export PYTHON=${{PYTHON:-{sys.executable}}}" in script.splitlines()


def test_a_stage_has_a_cp_of_its_own_beside_nodes_of_its_own(capsys, tmp_path: Path) -> None:
    """Each job is checked with its own stage and nodes, and the key of another job's stage is no mistake there."""
    script = dry(
        capsys, "experiment=quickstart", f"run_dir={tmp_path}/run", "launch.per_stage=true", "launch.gpus_per_node=0",
        "launch.ranks_per_node=2", "launch.nodes_by_stage={s8192: 2}", "parallel.cp_by_stage={s8192: 4}",
    )  # fmt: skip
    assert [line for line in script.splitlines() if "--nodes=" in line] == ["#SBATCH --nodes=1", "#SBATCH --nodes=2"]


def test_a_trained_stage_gets_no_job_again(capsys, tmp_path: Path) -> None:
    words = [
        "experiment=quickstart", f"run_dir={tmp_path}/run", "launch.per_stage=true", "launch.gpus_per_node=0",
        "launch.ranks_per_node=2",
    ]  # fmt: skip
    for name in ("s2048", "s8192"):
        mark = tmp_path / f"run/stages/{name}/finished.json"
        mark.parent.mkdir(parents=True)
        mark.write_text("{}")
        commands = [line for line in dry(capsys, *words).splitlines() if line.startswith("set -- ")]
        assert [line.rpartition(" ")[2] for line in commands] == ["launch.until=s8192"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["launch.nodse=2"], "launch.nodse is not a known key; did you mean launch.nodes?"),
        (["launch.gpus_per_node=0"], "gpus_per_node=0 leaves the number of ranks open; give ranks_per_node"),
        (["launch.mounts=[a:b]"], "mounts belong to a container; give its image as container=IMAGE"),
        (["launch.nodes_by_stage={s8192: 2}"], "nodes_by_stage needs a job for each stage; set per_stage=true"),
        (["launch.per_stage=true", "launch.nodes_by_stage={s9: 2}"], "launch.nodes_by_stage.s9 is no stage"),
        (["launch.per_stage=true", "launch.until=s2048"], "per_stage=true makes a job that ends after each stage"),
        (["launch.time=10"], "time=10 is 600 s, and lead_seconds=600 before its end the run is asked to save"),
        (["launch.time=soon"], "time=soon is not a time limit of Slurm; write minutes, HH:MM:SS"),
        (["launch.lead_seconds=70000"], "launch.lead_seconds=70000 must be at most 65,535"),
        (["launch.sbatch=[exclusive]"], "'exclusive' is not an option of sbatch; they begin with --"),
        (["launch.sbatch=['--time=1:00']"], "--time=1:00 is given by launch.time; set that key instead"),
        (["launch.sbatch=['-N 3']"], "-N 3 is given by launch.nodes"),
        (["launch.environment={1A: x}"], "environment: '1A' is not the name of a variable"),
        (["parallel.cp=3"], "parallel.cp=3 does not divide the 8 ranks; 2 fits"),
        (["launch.until=s9"], "launch.until=s9 is no stage of the curriculum; known: s2048, s8192"),
        (["data=text", "data.path=nowhere", "curriculum.mix=default", "after_training.sibling=null",
          "after_training.evidence=null"], "data.sources.text.path=nowhere"),
    ],
)  # fmt: skip
def test_a_mistake_costs_no_allocation(words: list[str], said: str, capsys, tmp_path: Path) -> None:
    given = ["experiment=quickstart", f"run_dir={tmp_path}/run", "dry_run=true", *words]
    assert cli.main(["submit", *given]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_what_does_not_fit_the_named_hardware_is_refused(capsys, tmp_path: Path) -> None:
    wide = "{family: llama, layers: 48, hidden: 8192, heads: 64, kv_heads: 8, ffn: 28672, vocab: 512, window: 512}"
    given = ["model=tiny_init", f"model.init={wide}", "model.dtype=bfloat16", "data=stdlib", f"run_dir={tmp_path}/run"]
    small = ["curriculum.scratch=true", "launch.nodes=1", "accept=[disk]", "engine.device=cuda", "dry_run=true"]
    assert cli.main(["submit", *given, *small, "hardware=l40s"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "needs about" in said
    assert "GiB on each device" in said
    assert "What would fit" in said


def test_a_side_run_that_does_not_fit_its_one_gpu_is_refused(capsys, tmp_path: Path) -> None:
    """The main run shares its sequences over eight GPUs; the sibling reads as long ones on one."""
    stage = "after_training.sibling.run.stage={seq_len: 524288, batch: 1, tokens: 5242880, theta: 1e6}"
    given = [
        "experiment=quickstart",
        f"run_dir={tmp_path}/run",
        "dry_run=true",
        "engine.device=cuda",
        "model.dtype=bfloat16",
        stage,
    ]
    assert cli.main(["submit", *given, "hardware.memory_gib=80"]) == 0
    capsys.readouterr()
    assert cli.main(["submit", *given, "hardware.memory_gib=2"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "stage sibling of 524,288 tokens needs about" in said


def test_without_sbatch_the_script_is_left(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    given = ["experiment=quickstart", f"run_dir={tmp_path}/run", "launch.gpus_per_node=0", "launch.ranks_per_node=2"]
    assert cli.main(["submit", *given]) == 2
    assert "sbatch is not on this machine" in capsys.readouterr().err
    assert (tmp_path / "run/submit/quickstart.sh").read_text().startswith("#!/usr/bin/env bash\n# quickstart: made by")


def test_words_of_the_job_are_not_the_run_s() -> None:
    given = ["--config-dir", "/c", "launch=slurm", "hardware=h100", "hardware.memory_gib=80", "launch.qos=x",
             "launch.nproc=2", "+launch.threads=1", "launch.until=s1", "dry_run=true", "model.path=M"]  # fmt: skip
    kept = ["--config-dir", "/c", "launch.nproc=2", "+launch.threads=1", "launch.until=s1", "model.path=M"]
    assert training_words(given) == tuple(kept)

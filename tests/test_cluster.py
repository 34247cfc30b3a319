"""The files of docs/cluster.md: each is what its system reads, asks for what there is, and the one for ssh runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import yaml

from millstream.cli.packing import pack

FILES = Path(__file__).resolve().parent.parent / "examples" / "cluster"
SCRIPTS = ("pack.sbatch", "pack-over-ssh.sh")


def flags(words):
    return set(re.findall(r"--[a-z-]+", words))


def known():
    return {flag for option in pack.params for flag in option.opts}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_one_and_its_flags_are_ours(name):
    subprocess.run(["bash", "-n", FILES / name], check=True)
    text = (FILES / name).read_text()
    called = text[text.index("millstream pack ", text.index("set -e")) :].partition("\n\n")[0]
    assert {"--out", "--join"} <= flags(called) <= known()


def test_slurm_reads_what_is_asked_of_it_before_the_first_command():
    lines = (FILES / "pack.sbatch").read_text().splitlines()
    asked = [number for number, line in enumerate(lines) if line.startswith("#SBATCH --")]
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert len(asked) > 5
    assert max(asked) < first


def test_the_job_is_yaml_of_an_indexed_job():
    job = yaml.safe_load((FILES / "pack-job.yaml").read_text())
    assert (job["apiVersion"], job["kind"], job["spec"]["completionMode"]) == ("batch/v1", "Job", "Indexed")
    pod = job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # what a pod failure policy asks for
    [container] = pod["containers"]
    rules = [rule["onExitCodes"] for rule in job["spec"]["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert {rule["containerName"] for rule in rules} == {container["name"]}
    assert [rule["values"] for rule in rules] == [[2], [3, 130]]
    assert {mount["name"] for mount in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}
    command = container["command"]
    assert command[:2] == ["millstream", "pack"]
    assert {"--out", "--join"} <= flags(" ".join(command)) <= known()
    pack.make_context("pack", command[2:])


def test_the_loop_over_ssh_packs_on_each_machine(tmp_path):
    source = runs.write_plain(tmp_path / "a.jsonl", runs.lines(5, 200_000))
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(
        '#!/bin/bash\nwhile [ "${1#-}" != "$1" ]; do [ "$1" = -o ] && shift; shift; done\nshift; eval "$*"\n'
    )
    ssh.chmod(0o755)
    path = os.pathsep.join([str(ssh.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    assert shutil.which("millstream", path=path)
    call = [FILES / "pack-over-ssh.sh", "one two", source, tmp_path / "out"]
    done = subprocess.run(call, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=runs.PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "one: " in done.stdout
    assert "two: " in done.stdout
    assert runs.is_complete(tmp_path / "out")

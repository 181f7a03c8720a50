"""The command: `python -m data prepare` and `verify`."""

import subprocess
import sys

import yaml

from data.__main__ import main
from data.manifest import read_manifest
from tests.support.corpus import ROOT, settings


def test_the_command_prepares_verifies_and_refuses(corpus, capsys):
    file = corpus / "config.yaml"
    file.write_text(yaml.safe_dump({"data": settings(corpus), "model": {"anything": "of others"}}))
    assert main(["prepare", str(file), "data.val_fraction=2e-1"]) == 0
    assert "bytes/token" in capsys.readouterr().out
    assert read_manifest(corpus / "prepared")["settings"]["val_fraction"] == 0.2
    assert main(["verify", str(file)]) == 0
    assert "every file matches its hash" in capsys.readouterr().out
    assert main(["prepare", str(file)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {corpus / 'prepared'} was prepared differently")
    (corpus / "prepared" / "val-00000.bin").write_bytes(b"")
    assert main(["verify", str(file)]) == 2
    assert "val-00000.bin: 0 bytes" in capsys.readouterr().err


def test_a_config_without_a_data_section_is_refused(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("model: {}")
    assert main(["prepare", str(tmp_path / "config.yaml")]) == 2
    assert "there is no `data:` section" in capsys.readouterr().err


def test_bad_input_exits_with_2_without_a_traceback():
    found = subprocess.run(
        [sys.executable, "-m", "data", "prepare", "none.yaml"], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr.startswith("error: none.yaml: there is no such file") and "Traceback" not in found.stderr
    help_text = subprocess.run([sys.executable, "-m", "data", "-h"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "prepare" in help_text and "verify" in help_text

"""What the image runs, run without it: its entry point with its variables, as the platform does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.sagemaker.conftest import LRAI

pytestmark = pytest.mark.server

DOCKERFILE = (Path(__file__).parents[3] / "deploy" / "sagemaker" / "Dockerfile").read_text()


def test_the_platform_would_not_trip_over_what_the_image_runs(
    models: Path, tmp_path: Path, sockets: Path
) -> None:
    (entry,) = re.findall(r"^ENTRYPOINT (\[.*\])$", DOCKERFILE, re.MULTILINE)
    variables = dict(re.findall(r"^ENV (\w+)=(\S+)$", DOCKERFILE, re.MULTILINE))
    place = [str(Path(sys.executable).parent), os.environ["PATH"]]
    environ = {**os.environ, **variables, "LRAI_RUNTIME_SOCKET_DIR": str(sockets)}
    environ |= {"PATH": os.pathsep.join(place), "LRAI_ACTOR_THREADS": "1"}
    model = models / "tokens.lrai"  # which the platform puts into /opt/ml/model
    with (tmp_path / "said").open("w") as said:  # a runtime that was started keeps it open
        done = subprocess.run(
            [*LRAI, "sagemaker", "check", "--artifact", model, *json.loads(entry), "serve", model],
            env=environ,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout
    assert done.stdout == "nothing that the platform would trip over\n"


READ_ONLY = """
mount -t tmpfs none /mnt
mkdir -m 1777 /mnt/tmp
mount -o remount,bind,ro /
export HOME=/nonexistent
exec unshare --user --map-user=1000 "$@"
"""


@pytest.mark.parametrize("temporary", ["/mnt/tmp", "/nonexistent"])
def test_it_runs_for_another_user_on_a_read_only_root_or_says_what_it_lacks(
    models: Path, tmp_path: Path, temporary: str
) -> None:
    model = str(models / "tokens.lrai")
    contained = ["unshare", "--map-root-user", "--mount", "sh", "-ec", READ_ONLY, "sh"]
    serve = [*LRAI, "sagemaker", "serve", "--host", "0.0.0.0", model]  # noqa: S104
    done = subprocess.run(
        [*contained, *LRAI, "sagemaker", "check", "--artifact", model, *serve],
        env={**os.environ, "TMPDIR": temporary, "LRAI_ACTOR_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if temporary == "/nonexistent":
        assert done.returncode == 3
        assert "exit status 5" in done.stdout
        assert "no temporary folder can be made: No usable temporary directory" in done.stderr
        assert "Traceback" not in done.stderr
    else:
        assert done.returncode == 0, done.stdout + done.stderr

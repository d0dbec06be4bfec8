"""script/image, which several hosts ask for at once: of one scenario, and of two that run beside each other."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Both keep a build open until everybody who would begin another has had the time to.
MMDEBSTRAP = """#!/bin/sh
echo build >>"$BUILDS"
for tar; do case $tar in *.tar) sleep 1; echo image >"$tar" ;; esac; done
"""
PODMAN = """#!/bin/sh
case "$1" in
image) test -f "$IMAGES/$(basename "$3")" ;;
import) shift $(($# - 2)); test -s "$1" && touch "$IMAGES/$(basename "$2")" ;;
esac
"""


def test_an_image_that_several_ask_for_at_once_is_built_once(tmp_path):
    scripts, programs, images, builds = (tmp_path / name for name in ("checkout/script", "bin", "images", "builds"))
    scripts.mkdir(parents=True), programs.mkdir(), images.mkdir()
    for name in ("image", "lib.sh", "containers"):
        copy = shutil.copytree if (ROOT / "script" / name).is_dir() else shutil.copy
        copy(ROOT / "script" / name, scripts / name)
    for name, text in (("mmdebstrap", MMDEBSTRAP), ("podman", PODMAN), ("sudo", '#!/bin/sh\nshift\nexec "$@"\n')):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "BUILDS": str(builds),
        "IMAGES": str(images),
    }
    asking = [
        subprocess.Popen([scripts / "image", "12"], env=environment, text=True, stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    names = {process.communicate(timeout=60)[0] for process in asking}
    assert [process.returncode for process in asking] == [0, 0, 0, 0]
    assert len(names) == 1 and names.pop().startswith("localhost/socket-handoff-debian:12-")
    assert builds.read_text().splitlines() == ["build"]

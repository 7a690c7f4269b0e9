"""axe-core, which finds what screen readers and keyboards stumble over; fetched when tests run."""

import base64
import hashlib
import io
import shutil
import subprocess
import tarfile
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from browser import Browser

PACKAGE = "axe-core@4.14.1"
SHA512 = "FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ=="
SERIOUS = ("serious", "critical")


@cache
def source() -> str:
    """Its script, or nothing where npm or the network is missing."""
    if not shutil.which("npm"):
        return ""
    with TemporaryDirectory() as place:
        command = ["npm", "pack", "--silent", "--prefer-offline", "--pack-destination", place]
        done = subprocess.run([*command, PACKAGE], capture_output=True, text=True)
        if done.returncode:
            return ""
        packed = (Path(place) / done.stdout.split()[-1]).read_bytes()
    found = base64.b64encode(hashlib.sha512(packed).digest()).decode()
    assert found == SHA512, f"{PACKAGE} is not what it was: {found}"
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        file = archive.extractfile("package/axe.min.js")
        assert file is not None
        return file.read().decode()


def findings(window: Browser) -> list[str]:
    """What is wrong with the page as it is now and serious: the rule and the elements."""
    window.run(source() + "\nwindow.axe = axe;")
    window.run(
        "window.found = null;"
        "axe.run().then(all => { window.found = all.violations; }, e => { window.found = `${e}`; })"
    )
    [rules] = window.until("return window.found && [window.found]")
    assert not isinstance(rules, str), rules
    return [
        f"{rule['id']}: {node['html'][:200]}"
        for rule in rules
        for node in rule["nodes"]
        if rule["impact"] in SERIOUS
    ]

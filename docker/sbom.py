"""Write the bill of materials of this Python environment, as CycloneDX 1.6 in JSON, to stdout.

usage: python docker/sbom.py > sbom.json

Every installed distribution is a component, with its version, its license as it states it, and its
package URL. The image holds the result as /opt/packhorse/sbom.json. Packages of the distribution
are not in it: `dpkg-query -W` lists those.
"""

from __future__ import annotations

import json
import platform
import re
import sys
import uuid
from importlib.metadata import Distribution, distributions
from typing import Any


def component(found: Distribution) -> dict[str, Any]:
    """Return a component of CycloneDX."""
    name = re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower()
    purl = f"pkg:pypi/{name}@{found.version.replace('+', '%2B')}"
    made: dict[str, Any] = {
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "version": found.version,
        "purl": purl,
    }
    # "License" is often the whole text of one
    metadata: Any = found.metadata
    stated = metadata.get("License-Expression") or metadata.get("License") or ""
    if stated and len(stated) < 100 and "\n" not in stated:
        is_expression = "License-Expression" in found.metadata
        made["licenses"] = [
            {"expression": stated} if is_expression else {"license": {"name": stated}}
        ]
    return made


def bill() -> dict[str, Any]:
    """Return the bill. The same environment has the same bill, its serial number included."""
    components = {made["purl"]: made for made in map(component, distributions())}
    content = [components[purl] for purl in sorted(components)]
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(content))
    main = next((made for made in content if made["name"] == "packhorse"), None)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        "metadata": {
            **({"component": {**main, "type": "application"}} if main else {}),
            "properties": [{"name": "python", "value": platform.python_version()}],
        },
        "components": [made for made in content if made is not main],
    }


if __name__ == "__main__":
    json.dump(bill(), sys.stdout, indent=1)

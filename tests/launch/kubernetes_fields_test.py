"""The fields that manifests are checked against, in the models that Kubernetes publishes for Python."""

import inspect
import re

import pytest
from kubernetes_fields import CONFIG_MAP, JOB, STRINGS

client = pytest.importorskip("kubernetes.client", reason="the models come with the extra `xmanager`")
PLAIN = {"str": str, "int": int, "bool": bool}
# Their models have these for every object, and leave it to the server that they are there.
BY_THE_SERVER = {"apiVersion", "kind", "metadata", "name", "spec"}


def differences(kind, model, where):
    """What a level of the fixture has otherwise than a model, and the levels below it."""
    names = {published: own for own, published in model.attribute_map.items()}
    source = inspect.getsource(model)
    for field, inner in kind.items():
        name = field.rstrip("!")
        if name not in names:
            yield f"{where}.{name}: no such field"
            continue
        published = model.openapi_types[names[name]]
        required = f"`{names[name]}`, must not be `None`" in source
        if required != field.endswith("!") and name not in BY_THE_SERVER:
            yield f"{where}.{name}: {'required' if required else 'optional'}"
        listed = re.fullmatch(r"list\[(.*)\]", published)
        if isinstance(inner, list) != (listed is not None):
            yield f"{where}.{name}: {published}"
            continue
        published, inner = (listed[1], inner[0]) if listed else (published, inner)
        if inner is STRINGS or inner is str or isinstance(inner, tuple) or inner in (int, bool):
            if (
                published not in ("dict(str, str)", "dict[str, str]")
                if inner is STRINGS
                else PLAIN.get(published) is not (str if isinstance(inner, tuple) else inner)
            ):
                yield f"{where}.{name}: {published}"
        else:
            yield from differences(inner, getattr(client, published), f"{where}.{name}")


@pytest.mark.parametrize(("kind", "model"), [(CONFIG_MAP, "V1ConfigMap"), (JOB, "V1JobSpec")], ids=["ConfigMap", "Job"])
def test_every_field_is_published(kind, model):
    assert list(differences(kind, getattr(client, model), model)) == []


def test_a_wrong_field_is_found():
    wrong = {"data": [str], "imutable": bool, "immutable": str, "binaryData!": STRINGS}
    assert list(differences(wrong, client.V1ConfigMap, "V1ConfigMap")) == [
        "V1ConfigMap.data: dict(str, str)",
        "V1ConfigMap.imutable: no such field",
        "V1ConfigMap.immutable: bool",
        "V1ConfigMap.binaryData: optional",
    ]

"""The fields that manifests are checked against, in the models that Kubernetes publishes for Python."""

import inspect
import re

import pytest
from kubernetes_fields import CONFIG_MAP, JOB, STRINGS

client = pytest.importorskip("kubernetes.client", reason="the models come with the extra `xmanager`")
# Their models have these for every object, and leave it to the server that they are there.
BY_THE_SERVER = {"apiVersion", "kind", "metadata", "name", "spec"}


def is_required(model, own):
    """Whether an object has to have a field: from version 37 on models are pydantic's, before they refuse None."""
    if hasattr(model, "model_fields"):
        return model.model_fields[own].is_required()
    return f"`{own}`, must not be `None`" in inspect.getsource(model)


def kind_of(published):
    """A published type as the fixture writes it; of a list, that of its items."""
    listed = re.fullmatch(r"[Ll]ist\[(.*)\]", published)
    if listed:
        return [kind_of(listed[1])]
    is_map = re.fullmatch(r"[Dd]ict[\[(]str, (str|bytes|object)[\])]", published)
    return STRINGS if is_map else {"str": str, "int": int, "bool": bool}.get(published, published)


def differences(kind, model, where):
    """What a level of the fixture has otherwise than a model, and the levels below it."""
    names = {published: own for own, published in model.attribute_map.items()}
    for field, inner in kind.items():
        name = field.rstrip("!")
        if name not in names:
            yield f"{where}.{name}: no such field"
            continue
        required = is_required(model, names[name])
        if required != field.endswith("!") and name not in BY_THE_SERVER:
            yield f"{where}.{name}: {'required' if required else 'optional'}"
        published = kind_of(model.openapi_types[names[name]])
        if isinstance(inner, list) and isinstance(published, list):
            (inner,), (published,) = inner, published
        if isinstance(published, str) and isinstance(inner, dict):
            yield from differences(inner, getattr(client, published), f"{where}.{name}")
        elif published != (str if isinstance(inner, tuple) else inner):
            yield f"{where}.{name}: {model.openapi_types[names[name]]}"


@pytest.mark.parametrize(("kind", "model"), [(CONFIG_MAP, "V1ConfigMap"), (JOB, "V1JobSpec")], ids=["ConfigMap", "Job"])
def test_every_field_is_published(kind, model):
    assert list(differences(kind, getattr(client, model), model)) == []


def test_a_wrong_field_is_found():
    wrong = {"data": [str], "imutable": bool, "immutable": str, "binaryData!": STRINGS}
    first, *others = differences(wrong, client.V1ConfigMap, "V1ConfigMap")
    assert first.startswith("V1ConfigMap.data: ")
    assert others == [
        "V1ConfigMap.imutable: no such field",
        "V1ConfigMap.immutable: bool",
        "V1ConfigMap.binaryData: optional",
    ]

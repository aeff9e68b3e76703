"""The semantic registry: a graph of devices and models, and who can run what.

After the semantic layer of "Towards TinyML at scale" (arXiv:2405.07601; reconstructed from its
abstract). Devices are W3C Things (td:) and platforms with sensors (sosa:); deployments are those
of ssn:. `vocabulary.ttl` adds memory, operators and windows, `shapes.ttl` (SHACL) says what a
complete entry has, and `fits.rq` (SPARQL) is the one question that is asked:

    device d can run model m  iff
        free(d, RAM) >= peak RAM of m  and  free(d, flash) >= size of m,
        every operator of m is one of a runtime of d,  and for every input of m
        d hosts a sensor of its quantity, with at least its values in a reading and its rate;
    free(d, .) is what d has less what the models deployed on it take.
"""

from __future__ import annotations

import os
import tempfile
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from isthmus import catalogue
from isthmus.errors import InputError, need, unknown

if TYPE_CHECKING:
    from rdflib import Graph, URIRef
    from rdflib.term import Node

EXTRA = "registry"
EDGE = "urn:isthmus:edge#"
SOSA = "http://www.w3.org/ns/sosa/"
SSN = "http://www.w3.org/ns/ssn/"
TITLE = "http://purl.org/dc/terms/title"
SHACL = "http://www.w3.org/ns/shacl#"


EXAMPLE = "example.ttl"
"""The graph that ships with the package: four boards and five models."""


class Fit(NamedTuple):
    """A device and a model that it can run, and the bytes that then stay free."""

    device: str
    model: str
    free_ram: int
    free_flash: int


@catalogue.register("tinyml", place="device", status="miniature")
class Registry:
    """Devices, models and deployments in one graph.

    With the example's, ``[fit.model for fit in Registry.load().models_for("microbit-v2")]`` is
    ``["ad"]``, and ``devices_for("magic-wand")`` names `nicla-vision` and `nano-33-ble-sense`.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    @classmethod
    def load(cls, path: Path | str | None = None) -> Registry:
        """The graph of a Turtle file; without one, the example's.

        Raises `InputError` for what is not Turtle, and for the first entry that is incomplete.
        """
        made = cls.read(path)
        wrong = made.violations()
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise InputError("graph", wrong[0] + more, "complete entries")
        return made

    @classmethod
    def read(cls, path: Path | str | None = None) -> Registry:
        """`load` without a look at the entries."""
        graph = need("rdflib", EXTRA).Graph()
        try:
            given = text(EXAMPLE) if path is None else Path(path).read_text(encoding="utf-8")
            graph.parse(data=given, format="turtle")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError("graph", str(path), f"a readable file ({error})") from error
        except Exception as error:  # the parser has no class of its own for all of its errors
            first = " ".join(str(error).split())[:160]
            raise InputError("graph", str(path), f"Turtle ({first})") from error
        return cls(graph)

    def save(self, path: Path | str) -> None:
        """Write the graph as Turtle, whole or not at all."""
        path = Path(path)
        given = self.graph.serialize(format="turtle")
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            file.write(given)
        os.replace(file.name, path)

    def violations(self) -> list[str]:
        """What is wrong with the entries, a line each, beginning with the node's name."""
        shapes = need("rdflib", EXTRA).Graph().parse(data=text("shapes.ttl"), format="turtle")
        known = need("rdflib", EXTRA).Graph().parse(data=text("vocabulary.ttl"), format="turtle")
        _, results, _ = need("pyshacl", EXTRA).validate(
            self.graph, shacl_graph=shapes, ont_graph=known, inference="none"
        )
        lines = set()
        for result in results.subjects(_iri(SHACL + "focusNode")):
            focus = results.value(result, _iri(SHACL + "focusNode"))
            said = results.value(result, _iri(SHACL + "resultMessage"))
            value = results.value(result, _iri(SHACL + "value"))
            given = "" if value is None else f", not {self._owned(value)}"
            lines.add(f"{self._owned(focus)}: {said}{given}")
        return sorted(lines)

    def names(self, kind: str) -> list[str]:
        """The names of all nodes of a class of the vocabulary: `Device`, `Model`."""
        return sorted(name(node) for node in self._all(kind))

    def models_for(self, device: str) -> list[Fit]:
        """The models that fit beside what is deployed, most free RAM first."""
        return self._fits(device=self._find("Device", device))

    def devices_for(self, model: str) -> list[Fit]:
        """The devices that can run the model, most free RAM first."""
        return self._fits(model=self._find("Model", model))

    def deploy(self, model: str, device: str) -> dict[str, Any]:
        """Write a deployment into the graph; its descriptor: model file, sensors, buffers.

        Each input is bound to the slowest sensor that is fast enough. Raises `InputError` where
        the device cannot run the model.
        """
        what, where = self._find("Model", model), self._find("Device", device)
        fits = self._fits(device=where, model=what)
        if not fits:
            able = ", ".join(fit.device for fit in self.devices_for(model)) or "no device"
            raise InputError("device", device, f"for {model}: {able}")
        rdflib = need("rdflib", EXTRA)
        taken, number = set(self.graph.subjects()), 1
        while (deployment := rdflib.URIRef(f"{where}-runs-{name(what)}-{number}")) in taken:
            number += 1
        add, edge = self.graph.add, rdflib.Namespace(EDGE)
        add((deployment, rdflib.RDF.type, _iri(SSN + "Deployment")))
        add((deployment, _iri(SSN + "deployedSystem"), what))
        add((deployment, _iri(SSN + "deployedOnPlatform"), where))
        bindings = []
        for given in sorted(self.graph.objects(what, edge.input), key=self._input_order):
            sensor = self._sensor(where, given)
            size = self._number(given, "values") * self._number(given, "window")
            size *= self._number(given, "valueBytes")
            binding = rdflib.BNode()
            add((deployment, edge.binding, binding))
            add((binding, edge.feeds, given))
            add((binding, edge.sensor, sensor))
            add((binding, edge.bufferBytes, rdflib.Literal(size)))
            bindings.append(
                {
                    "quantity": name(self.graph.value(given, edge.quantity)),
                    "sensor": str(self.graph.value(sensor, _iri(TITLE)) or name(sensor)),
                    "rate": float(self._number(given, "rate")),
                    "window": self._number(given, "window"),
                    "buffer_bytes": size,
                }
            )
        return {
            "deployment": name(deployment),
            "device": name(where),
            "model": name(what),
            "file": str(self.graph.value(what, edge.file)),
            "inputs": bindings,
            "free_ram": fits[0].free_ram,
            "free_flash": fits[0].free_flash,
        }

    # -- the graph ------------------------------------------------------------------------

    def _fits(self, **given: URIRef) -> list[Fit]:
        rows: Any = self.graph.query(_question(), initBindings=given)
        return [
            Fit(name(row.device), name(row.model), int(row.freeRam), int(row.freeFlash))
            for row in rows
        ]

    def _sensor(self, device: Node, given: Node) -> Node:
        quantity = self.graph.value(given, _iri(EDGE + "quantity"))
        able = [
            sensor
            for sensor in self.graph.objects(device, _iri(SOSA + "hosts"))
            if (sensor, _iri(SOSA + "observes"), quantity) in self.graph
            and all(
                self._number(sensor, what) >= self._number(given, what)
                for what in ("values", "rate")
            )
        ]
        title = _iri(TITLE)  # nodes without a name have a new one after each reading
        return min(
            able,
            key=lambda sensor: (
                *(self._number(sensor, what) for what in ("rate", "values")),
                str(self.graph.value(sensor, title) or name(sensor)),
            ),
        )

    def _input_order(self, given: Node) -> tuple[Any, ...]:
        quantity = str(self.graph.value(given, _iri(EDGE + "quantity")))
        return (quantity, *(self._number(given, w) for w in ("rate", "values", "window")))

    def _number(self, node: Node, what: str) -> Any:
        value: Any = self.graph.value(node, _iri(EDGE + what))
        return value.toPython()

    def _all(self, kind: str) -> list[Any]:
        of = need("rdflib", EXTRA).RDF.type
        return sorted(set(self.graph.subjects(of, _iri(EDGE + kind))))

    def _find(self, kind: str, given: str) -> URIRef:
        """The node of this name or IRI."""
        nodes = self._all(kind)
        found = [node for node in nodes if given in (str(node), name(node))]
        if len(found) > 1:
            raise InputError(kind.lower(), given, "one of " + ", ".join(map(str, found)))
        if not found:
            raise unknown(kind.lower(), given, [name(node) for node in nodes])
        return found[0]

    def _owned(self, node: Any) -> str:
        """The name of a node; of one without a name, that of the node it belongs to."""
        if not isinstance(node, need("rdflib", EXTRA).BNode):
            return name(node)
        owner, by, _ = next(iter(self.graph.triples((None, None, node))), (None, None, None))
        return f"{self._owned(owner)} {name(by)}" if owner is not None else "a node without a name"


def text(file: str) -> str:
    """A file of this package."""
    return (resources.files(__package__) / file).read_text(encoding="utf-8")


@cache
def _question() -> Any:
    """`fits.rq`, read once: reading takes longer than answering."""
    return need("rdflib.plugins.sparql", EXTRA).prepareQuery(text("fits.rq"))


def name(node: Any) -> str:
    """What follows the last `#` or `/` of an IRI.

    >>> name("urn:isthmus:example#pico")
    'pico'
    """
    return str(node).rstrip("/#").rpartition("#")[2].rpartition("/")[2]


def _iri(text: str) -> URIRef:
    return need("rdflib", EXTRA).URIRef(text)

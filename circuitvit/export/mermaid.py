"""The picture as Mermaid, for READMEs, wikis and notebooks; Mermaid decides about places."""

from __future__ import annotations

from circuitvit.export import style
from circuitvit.export.picture import DrawnEdge, Picture
from circuitvit.export.text import clean, number

_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .+,_")
_SHAPES = {"head": ('["', '"]'), "mlp": ('(["', '"])'), "end": ('["', '"]')}


def mermaid_of(picture: Picture) -> str:
    """The picture as a Mermaid flowchart, input at the bottom.

    Viewers refuse more than 500 edges unless they are told otherwise; `max_edges` thins the picture out.

    Example:
        >>> from circuitvit.export.picture import picture_of
        >>> from circuitvit.graph import Circuit
        >>> from circuitvit.graph.eap_ig import transformer_graph
        >>> circuit = Circuit.from_edges(transformer_graph(1, 2), ["input->m0", "m0->logits"])
        >>> print(mermaid_of(picture_of(circuit, title="Two edges")))
        ---
        title: "Two edges"
        ---
        flowchart BT
          n0["input"]
          n3(["m0"])
          n4["logits"]
          n3 --> n4
          n0 --> n3
          linkStyle 0 stroke:#5A5F66,stroke-width:1.3px
          linkStyle 1 stroke:#5A5F66,stroke-width:1.3px
          classDef mlp fill:#E9ECF1,stroke:#1F2328,color:#1F2328
          classDef head fill:#FFFFFF,stroke:#1F2328,color:#1F2328
          classDef end_ fill:#30363D,stroke:#1F2328,color:#FFFFFF
          class n0,n4 end_
          class n3 mlp
        <BLANKLINE>
    """
    names = {node.name: f"n{index}" for index, node in enumerate(picture.nodes) if node.present}
    kinds: dict[str, list[str]] = {}
    lines = ["---", f'title: "{_yaml(picture.title)}"', "---", "flowchart BT"]
    for node in picture.nodes:
        if node.present:
            opening, closing = _SHAPES[node.kind]
            lines.append(f"  {names[node.name]}{opening}{inert(node.name)}{closing}")
            kinds.setdefault("end_" if node.kind == "end" else node.kind, []).append(names[node.name])
    for edge in picture.edges:
        lines.append(f"  {names[edge.sender]} -->{_label(edge, picture)} {names[edge.target]}")
    for index, edge in enumerate(picture.edges):
        look = edge.look
        dash = f",stroke-dasharray:{look.dash}" if look.dash else ""
        lines.append(f"  linkStyle {index} stroke:{look.colour},stroke-width:{look.width:.1f}px{dash}")
    for kind, fill, ink in (
        ("mlp", style.MLP_FILL, style.INK),
        ("head", style.PAPER, style.INK),
        ("end_", style.END_FILL, style.PAPER),
    ):
        lines.append(f"  classDef {kind} fill:{fill},stroke:{style.INK},color:{ink}")
    lines += [f"  class {','.join(members)} {kind}" for kind, members in kinds.items()]
    return "\n".join([*lines, ""])


def inert(text: str) -> str:
    """Text in which Mermaid, YAML and HTML find no mark-up: all but plain letters by their number.

    Example:
        >>> inert('"<b>')
        '#34;#60;b#62;'
    """
    return "".join(letter if letter in _PLAIN else f"#{ord(letter)};" for letter in clean(text))


def _yaml(text: str) -> str:
    """Text for a YAML string in double quotes, where Mermaid shows its own numbered letters as they are."""
    return "".join(letter if letter in _PLAIN else f"\\U{ord(letter):08x}" for letter in clean(text))


def _label(edge: DrawnEdge, picture: Picture) -> str:
    group = f"@{picture.groups[edge.group]}" if len(picture.groups) > 1 else ""
    score = "" if edge.score is None else number(edge.score, signed=True)
    words = " ".join(word for word in (f"{edge.port}{group}", score) if word)
    return f'|"{inert(words)}"|' if words else ""

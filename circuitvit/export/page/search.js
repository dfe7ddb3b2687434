/* Search by name: nodes and edges whose name holds the words, highlighted and listed. */

const searchBox = document.getElementById("search");
const results = document.getElementById("results");
const RESULTS = 12;

/** What a text finds: every word must be part of the name. Exact names of nodes come first. */
function find(text) {
  const words = text.toLowerCase().replaceAll("\u2192", "->").split(/\s+/).filter(Boolean);
  if (!words.length) return null;
  const holds = (name) => words.every((word) => name.toLowerCase().includes(word));
  const found = nodes.filter((node) => node.element && holds(node.name)).map((node) => ({ node }));
  const lines = strongestFirst(edges.filter((edge) => view.allowed[edge.id] && holds(edge.name))).map((edge) => ({ edge }));
  return [...found, ...lines];
}

function search() {
  const found = find(searchBox.value), status = document.getElementById("found");
  state.matches = found && {
    nodes: new Set(found.filter((item) => item.node).map((item) => item.node.id)),
    edges: new Set(found.filter((item) => item.edge).map((item) => item.edge.id)),
  };
  results.replaceChildren();
  results.hidden = !found || !found.length;
  status.textContent = found ? `${state.matches.nodes.size} nodes, ${state.matches.edges.size} edges` : "";
  for (const item of (found ?? []).slice(0, RESULTS)) {
    const link = linkTo(item, nameOf(item), results);
    link.addEventListener("click", endSearch);
  }
  paint();
}

/** The list goes away; the highlights stay until the text is deleted. */
function endSearch() {
  results.hidden = true;
}

function startSearch() {
  searchBox.addEventListener("input", search);
  searchBox.addEventListener("focus", () => { results.hidden = !results.children.length; });
  searchBox.addEventListener("keydown", (event) => {
    const first = results.querySelector("button");
    if (event.key === "Enter" && first) first.click();
    else if (event.key === "ArrowDown" && first) first.focus();
    else return;
    event.preventDefault();
  });
  document.addEventListener("pointerdown", (event) => { if (!event.target.closest(".search")) endSearch(); });
}

/* Connections between layers: all edges from one layer, or folded block of layers, to another as one arc. */

const WIDEST_ARC = 13;

/** What an arc can join: the ends of the graph, layers, folded blocks; by the row that a node stands in. */
function unitOf(row) {
  const block = blockOfRow[row], layer = DATA.rowBlocks[row];
  if (block === null) return { key: `row ${row}`, name: (rowNodes[row][0] ?? { name: "" }).name, rows: [row] };
  if (block.folded) return { key: block.name, name: block.name, rows: block.rows };
  return { key: layer, name: layer, rows: block.rows.filter((each) => DATA.rowBlocks[each] === layer) };
}

/** The edges that are alive, by the layers that they join; the weakest connection first. */
function bundlesNow() {
  const units = DATA.rows.map((_, row) => unitOf(row)), found = new Map();
  for (const edge of edges) {
    if (!view.live[edge.id]) continue;
    const [from, to] = [units[nodes[edge.from].row], units[nodes[edge.to].row]], key = `${from.key} > ${to.key}`;
    if (!found.has(key)) found.set(key, { key, from, to, edges: [], name: from.key === to.key ? `within ${from.name}` : `${from.name} \u2192 ${to.name}` });
    found.get(key).edges.push(edge);
  }
  const weight = (bundle) => (TOTAL_EFFECT ? bundle.edges.reduce((sum, edge) => sum + strength(edge), 0) : bundle.edges.length);
  return [...found.values()].map((bundle) => ({ ...bundle, weight: weight(bundle), sign: signOf(bundle.edges) })).sort((a, b) => a.weight - b.weight);
}

/** What most of the effects of some edges do. */
function signOf(list) {
  const net = list.reduce((sum, edge) => sum + strength(edge) * ((edge.sign === "supports") - (edge.sign === "opposes")), 0);
  return net > 0 ? "supports" : net < 0 ? "opposes" : "unscored";
}

/** Arcs in the lane beside the rows: they leave a layer at its upper half and enter at its lower. */
function drawBundles() {
  layers.bundles.replaceChildren();
  view.bundles = bundlesNow();
  if (state.allEdges) return;
  const most = Math.max(...view.bundles.map((bundle) => bundle.weight), 1e-30), tall = drawnHeight(), x = drawnWidth() + 9;
  const extent = ({ rows }) => [place(DATA.rows[Math.max(...rows)][0]), place(DATA.rows[Math.min(...rows)][1])];
  for (const unit of new Map(DATA.rows.map((_, row) => [unitOf(row).key, unitOf(row)])).values()) {
    const [top, bottom] = extent(unit);
    draw("rect", { class: "post", x: x - 4, y: top, width: 3, height: Math.max(2, bottom - top), rx: 1.5 }, layers.bundles);
  }
  for (const bundle of view.bundles) {
    const [outTop, outBottom] = extent(bundle.from), [inTop, inBottom] = extent(bundle.to);
    const start = outTop + 0.3 * (outBottom - outTop), end = inTop + 0.7 * (inBottom - inTop);
    const within = bundle.from.key === bundle.to.key, reach = within ? 22 : MARGIN.lane * (0.2 + (0.85 * (start - end)) / tall);
    const path = within ? `M${x} ${outBottom}C${x + reach} ${outBottom} ${x + reach} ${outTop} ${x} ${outTop}` : `M${x} ${start}C${x + reach} ${start} ${x + reach} ${end} ${x} ${end}`;
    const share = bundle.weight / most, look = { "stroke-width": Math.max(1.2, WIDEST_ARC * share).toFixed(1), "stroke-opacity": (0.3 + 0.5 * share).toFixed(2) };
    bundle.element = draw("path", { class: "bundle " + bundle.sign, d: path, ...look }, layers.bundles);
    bundle.element.bundle = bundle;
  }
  paintBundles();
}

function paintBundles() {
  for (const bundle of view.bundles) {
    if (!bundle.element) continue;
    const chosen = [state.focus, state.hover].some((item) => item && item.bundle && item.bundle.key === bundle.key);
    bundle.element.setAttribute("class", `bundle ${bundle.sign}${chosen ? " hot" : ""}`);
  }
}

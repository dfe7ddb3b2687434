"use strict";

/* The circuit as arrays, and the questions that are asked of it: what is alive, what lies on a path. */

const DATA = JSON.parse(document.getElementById("data").textContent);
const SIGNS = ["unscored", "supports", "opposes"];
const GROUPS = DATA.groups.length;

/** Numbers in three significant digits, as in the static figures. */
function say(value, signed = false) {
  const text = Math.abs(value) >= 1e5 ? value.toExponential(2) : String(Number(value.toPrecision(3)));
  return (signed && value >= 0 ? "+" + text : text).replace("-", "\u2212");
}

const nodes = DATA.nodes.map((node, id) => ({ ...node, id, into: [], out: [] }));
const receivers = DATA.receivers.map(([node, port, feeds, mixes, readout]) => ({ node, port, feeds, mixes, readout }));
const senders = DATA.senders.map(([node, source]) => ({ node, source, fedBy: [] }));
receivers.forEach((receiver, id) => receiver.feeds.forEach((sender) => senders[sender].fedBy.push(id)));

/** Edges in drawing order: weakest first, so the strongest k are the last k. */
const edges = DATA.edges.map(([sender, receiver, group, score, sign, width, opacity, path, low, high], id) => {
  const from = senders[sender].node, to = receivers[receiver].node, port = receivers[receiver].port;
  const ending = (port ? "<" + port + ">" : "") + (GROUPS > 1 ? "@" + DATA.groups[group] : "");
  const name = nodes[from].name + "->" + nodes[to].name + ending;
  const edge = { id, sender, receiver, group, score, sign: SIGNS[sign], width, opacity, path, low, high, from, to, port, name };
  nodes[from].out.push(edge);
  nodes[to].into.push(edge);
  return edge;
});
const TOTAL_EFFECT = edges.reduce((sum, edge) => sum + Math.abs(edge.score ?? 0), 0);

// A sender's edges end in later stages, so in this order whatever feeds a sender comes before its edges.
const bySender = [...edges].sort((a, b) => a.sender - b.sender || a.id - b.id);
const byReceiver = [...edges].sort((a, b) => b.receiver - a.receiver || a.id - b.id);

/** The places (index * GROUPS + group) at an end, for one group or, where tokens mix, for all. */
function places(index, group, mixes) {
  if (!mixes) return [index * GROUPS + group];
  return Array.from({ length: GROUPS }, (_, each) => index * GROUPS + each);
}

/** Marks the edges that can be reached from the sender places in `reached`, which grows on the way. */
function markForward(allowed, reached, marks) {
  for (const edge of bySender) {
    if (!allowed[edge.id] || !reached[edge.sender * GROUPS + edge.group]) continue;
    marks[edge.id] = 1;
    const receiver = receivers[edge.receiver];
    for (const sender of receiver.feeds)
      for (const place of places(sender, edge.group, receiver.mixes)) reached[place] = 1;
  }
}

/** Marks the edges that lead to the receiver places in `wanted`, which grows on the way. */
function markBackward(allowed, wanted, marks) {
  for (const edge of byReceiver) {
    if (!allowed[edge.id] || !wanted[edge.receiver * GROUPS + edge.group]) continue;
    marks[edge.id] = 1;
    for (const receiver of senders[edge.sender].fedBy)
      for (const place of places(receiver, edge.group, receivers[receiver].mixes)) wanted[place] = 1;
  }
}

/** The allowed edges that lie on an allowed path from a source to a readout. */
function liveEdges(allowed) {
  const reached = new Uint8Array(senders.length * GROUPS), wanted = new Uint8Array(receivers.length * GROUPS);
  const heard = new Uint8Array(edges.length), leads = new Uint8Array(edges.length);
  senders.forEach((sender, id) => sender.source && reached.fill(1, id * GROUPS, (id + 1) * GROUPS));
  receivers.forEach((receiver, id) => receiver.readout && wanted.fill(1, id * GROUPS, (id + 1) * GROUPS));
  markForward(allowed, reached, heard);
  markBackward(allowed, wanted, leads);
  return heard.map((mark, id) => mark & leads[id]);
}

/** The allowed edges on paths through a node, or through an edge. */
function edgesThrough(allowed, { node, edge }) {
  const reached = new Uint8Array(senders.length * GROUPS), wanted = new Uint8Array(receivers.length * GROUPS);
  const marks = new Uint8Array(edges.length);
  if (node) {
    senders.forEach((sender, id) => sender.node === node.id && reached.fill(1, id * GROUPS, (id + 1) * GROUPS));
    receivers.forEach((each, id) => each.node === node.id && wanted.fill(1, id * GROUPS, (id + 1) * GROUPS));
  } else {
    marks[edge.id] = 1;
    const { feeds, mixes } = receivers[edge.receiver];
    for (const sender of feeds) for (const place of places(sender, edge.group, mixes)) reached[place] = 1;
    for (const receiver of senders[edge.sender].fedBy)
      for (const place of places(receiver, edge.group, receivers[receiver].mixes)) wanted[place] = 1;
  }
  markForward(allowed, reached, marks);
  markBackward(allowed, wanted, marks);
  return marks;
}

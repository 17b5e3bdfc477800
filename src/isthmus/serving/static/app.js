// The page: sends a prompt to /api/trace and draws the rounds as they come. Text only ever enters the
// document as text nodes, so nothing that a model writes can be markup.
"use strict";

const at = (id) => document.getElementById(id);
const make = (name, kind, text) => {
  const element = document.createElement(name);
  if (kind) element.className = kind;
  if (text !== undefined) element.textContent = text;
  return element;
};
// white space that would not be seen
const visible = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "·") || "∅";

let run = null;

function fresh() {
  return { tokens: 0, forwards: 0, drafted: 0, accepted: 0, seconds: 0, kinds: new Map(), rows: [], stop: new AbortController() };
}

function kindOf(drafter) {
  if (drafter === "none") return "target";
  if (drafter === "constraint") return "forced";
  if (!run.kinds.has(drafter)) run.kinds.set(drafter, `by-${run.kinds.size % 4}`);
  return run.kinds.get(drafter);
}

function legend() {
  const entries = [["target", "the model itself"], ...[...run.kinds].map(([name, kind]) => [kind, `drafted by ${name}`])];
  if (run.forced) entries.push(["forced", "forced by the constraint"]);
  at("legend").replaceChildren(...entries.map(([kind, text]) => {
    const item = make("li");
    item.append(make("span", `token ${kind}`, text));
    return item;
  }));
}

function draftTree(round) {
  const children = new Map();
  round.parents.forEach((parent, node) => children.set(parent, [...(children.get(parent) || []), node]));
  const branch = (parent) => {
    const list = make("ul");
    for (const node of children.get(parent) || []) {
      const item = make("li");
      // a chain is drawn on one line
      let last = node;
      item.append(make("code", round.stands[last] ? `token ${kindOf(round.drafter)}` : "gone", visible(round.drafted[last])));
      while ((children.get(last) || []).length === 1) {
        [last] = children.get(last);
        item.append(" ", make("code", round.stands[last] ? `token ${kindOf(round.drafter)}` : "gone", visible(round.drafted[last])));
      }
      if (children.has(last)) item.append(branch(last));
      list.append(item);
    }
    return list;
  };
  return branch(-1);
}

function drawGraph() {
  const cell = 9;
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("width", String(Math.max(1, run.tokens) * cell));
  svg.setAttribute("height", String(Math.max(1, run.rows.length) * cell));
  run.rows.forEach((row, y) => row.kinds.forEach((kind, i) => {
    const box = document.createElementNS(space, "rect");
    const place = { x: (row.start + i) * cell, y: y * cell, width: cell - 1, height: cell - 1 };
    for (const [name, value] of Object.entries(place)) box.setAttribute(name, String(value));
    box.setAttribute("class", kind);
    svg.append(box);
  }));
  at("graph").replaceChildren(svg);
  at("graph").setAttribute("aria-label", `${run.rows.length} rounds made ${run.tokens} tokens`);
}

function numbers() {
  at("n-tokens").textContent = String(run.tokens);
  at("n-forwards").textContent = String(run.forwards);
  at("n-length").textContent = run.forwards ? (run.tokens / run.forwards).toFixed(2) : "–";
  at("n-speed").textContent = run.seconds > 0 ? (run.tokens / run.seconds).toFixed(0) : "–";
  at("n-accepted").textContent = run.drafted ? `${run.accepted} of ${run.drafted}` : "none drafted";
}

function showRound(round) {
  const kind = kindOf(round.drafter);
  run.forced ||= kind === "forced";
  const kinds = round.emitted.map((_, i) => (i < round.accepted ? kind : "target"));
  run.rows.push({ start: run.tokens, kinds });
  run.tokens = round.tokens;
  run.forwards = round.forwards;
  run.drafted += round.drafted.length;
  run.accepted += round.accepted;
  run.seconds = round.seconds;
  round.emitted.forEach((text, i) => {
    const token = make("span", `token ${kinds[i]}`, text);
    token.title = `round ${round.forwards}, ${i < round.accepted ? round.drafter : "the model itself"}`;
    at("answer").append(token);
  });
  const lost = round.drafted.length - round.accepted;
  const item = make("li");
  const who = round.drafter === "none" ? "plain" : round.drafter;
  const count = round.emitted.length === 1 ? "1 token" : `${round.emitted.length} tokens`;
  const drafts = round.drafted.length ? `, ${round.accepted} of ${round.drafted.length} drafts accepted` : "";
  const head = `${who}: ${count}${drafts}`;
  if (round.drafted.length) {
    const more = make("details");
    more.open = at("rejected").checked && lost > 0;
    more.append(make("summary", "", head), draftTree(round));
    item.append(more);
  } else {
    item.append(make("span", "", head));
  }
  at("rounds").append(item);
}

async function decode(event) {
  event.preventDefault();
  if (run) run.stop.abort();
  const mine = (run = fresh());
  for (const id of ["answer", "rounds", "legend", "graph"]) at(id).replaceChildren();
  at("error").hidden = true;
  at("n-finish").textContent = "…";
  at("go").disabled = true;
  at("stop").disabled = false;
  const body = { prompt: at("prompt").value, max_tokens: Number(at("tokens").value), temperature: Number(at("temperature").value), seed: Number(at("seed").value) };
  try {
    if (at("schema").value.trim()) {
      try {
        body.json_schema = JSON.parse(at("schema").value);
      } catch {
        throw new Error("the JSON Schema is no valid JSON");
      }
    }
    const headers = { "content-type": "application/json" };
    if (at("key").value) headers.authorization = `Bearer ${at("key").value}`;
    const answer = await fetch("api/trace", { method: "POST", headers, body: JSON.stringify(body), signal: mine.stop.signal });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    let rest = "";
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part.replace(/^data: /, "");
        if (data === "[DONE]") continue;
        const entry = JSON.parse(data);
        if (entry.error) throw new Error(entry.error.message);
        if (entry.drafter !== undefined) showRound(entry);
        else at("n-finish").textContent = entry.finish_reason === "length" ? "at the limit" : entry.finish_reason;
      }
      legend();
      numbers();
      drawGraph();
    }
  } catch (error) {
    if (error.name === "AbortError") {
      at("n-finish").textContent = "stopped";
    } else {
      at("error").textContent = error.message;
      at("error").hidden = false;
      at("n-finish").textContent = "–";
    }
  } finally {
    if (run === mine) {
      at("go").disabled = false;
      at("stop").disabled = true;
    }
  }
}

at("form").addEventListener("submit", decode);
at("stop").addEventListener("click", () => run && run.stop.abort());
at("rejected").addEventListener("change", () => {
  for (const more of document.querySelectorAll("#rounds details")) more.open = at("rejected").checked;
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("form").requestSubmit();
});
fetch("v1/models").then(async (answer) => {
  at("key-field").hidden = answer.status !== 401;
  at("model").textContent = answer.ok ? (await answer.json()).data[0].id : "asks for a key";
});

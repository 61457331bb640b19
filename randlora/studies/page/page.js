"use strict";
// The page works by three things: what is chosen, the rows of the data that this leaves, and the charts' templates.
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const runs = new Map(data.runs.map((run, index) => [run.id, { ...run, index }]));
const unique = (values) => [...new Set(values)];
const part = () => at("part").value;
const ofPart = (rows) => rows.filter((row) => row.part === part());
const chosen = (id, name) => at(id).querySelector(`select[name="${name}"]`).value;
const COSTS = {
  parameters: "trained parameters", mebibytes: "peak memory, MiB", seconds: "training time, s", bytes: "size of the adapter, bytes",
};

function element(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

// Fills a control; what was chosen stays where it is still there.
function offer(id, name, values, texts = values, first = values[0]) {
  const select = at(id).querySelector(`select[name="${name}"]`);
  const kept = values.includes(select.value) ? select.value : values.includes(first) ? first : values[0];
  select.replaceChildren(...values.map((value, index) => element("option", { value, textContent: texts[index] })));
  if (kept !== undefined) select.value = kept;
  select.parentElement.hidden = values.length === 0;
}

async function draw(id, rows, words = {}, why = "There is nothing to show here for this part.") {
  const figure = at(id).querySelector("figure");
  const place = figure.querySelector(".chart");
  const empty = figure.querySelector(".empty");
  empty.textContent = why;
  empty.hidden = rows.length > 0;
  place.hidden = rows.length === 0;
  place.view?.finalize();
  place.replaceChildren();
  if (rows.length === 0) return;
  const labels = unique(rows.map((row) => row.label)).filter((label) => label in data.labels).sort();
  const values = {
    ...words, $labels: labels, $colours: labels.map((label) => data.labels[label][0]),
    $shapes: labels.map((label) => data.labels[label][1]), $columns: Math.max(1, Math.floor(place.clientWidth / 170)), $height: 22 * rows.length, $label_limit: Math.min(340, Math.round(place.clientWidth * 0.45)),
  };
  const spec = JSON.parse(JSON.stringify(data.charts[id]), (_, value) =>
    typeof value !== "string" ? value : value in values ? values[value] : value.replaceAll("$x", values.$x ?? "$x"));
  spec.datasets = { rows };
  spec.layer = spec.layer?.filter((layer) => layer.name !== "before" || rows.some((row) => typeof row.before === "number"));
  const actions = { export: true, source: false, compiled: false, editor: false };
  const { view } = await vegaEmbed(place, spec, { renderer: "svg", actions, downloadFileName: `${part()}, ${id}` });
  place.view = view;
  place.querySelector("summary").setAttribute("aria-label", "Save this chart");
  view.addEventListener("click", (_, item) => {
    const target = item?.datum?.runs ?? (item?.datum?.id && [item.datum.id]);
    if (target) location.hash = address(target);
  });
}

function drawPareto() {
  const rows = ofPart(data.arms);
  offer("pareto", "cell", unique(rows.map((row) => row.cell)));
  const costs = Object.keys(COSTS).filter((cost) => rows.some((row) => row[cost] > 0));
  offer("pareto", "x", costs, costs.map((cost) => COSTS[cost]));
  const cost = chosen("pareto", "x");
  const shown = rows.filter((row) => row.cell === chosen("pareto", "cell") && row[cost] > 0);
  const levels = ofPart(data.levels).filter((row) => row.cell === chosen("pareto", "cell"));
  draw("pareto", [...shown, ...levels], { $x: cost, $x_title: COSTS[cost], $y_title: `${shown[0]?.metric}, %` });
}

function drawBudgets() {
  const rows = ofPart(data.arms);
  const several = unique(rows.map((row) => row.series)).filter(
    (series) => unique(rows.filter((row) => row.series === series).map((row) => row.budget)).length > 1);
  offer("budgets", "series", several);
  const shown = rows.filter((row) => row.series === chosen("budgets", "series"));
  draw("budgets", shown, { $y_title: `${shown[0]?.metric}, %` }, "No task of this part has several budgets.");
}

function drawRates() {
  const rows = ofPart(data.rates);
  offer("rates", "cell", unique(rows.map((row) => row.cell)));
  const shown = rows.filter((row) => row.cell === chosen("rates", "cell"));
  draw("rates", shown, { $y_title: `validation ${shown[0]?.metric}, %` }, "No method of this part has several learning rates.");
}

function drawCurves() {
  const logged = ofPart(data.runs).filter((run) => run.id in data.curves);
  offer("curves", "cell", unique(logged.map((run) => run.cell)));
  const ofCell = logged.filter((run) => run.cell === chosen("curves", "cell"));
  offer("curves", "metric", unique(ofCell.flatMap((run) => Object.keys(data.curves[run.id]))));
  const metric = chosen("curves", "metric");
  const label = Object.fromEntries(ofPart(data.arms).flatMap((arm) => arm.runs.map((id) => [id, arm.label])));
  const rows = ofCell.flatMap((run) => {
    const [steps, values] = data.curves[run.id][metric] ?? [[], []];
    return steps.map((step, index) => (
      { id: run.id, label: label[run.id] ?? run.method, seed: run.seed, step, value: values[index] }));
  });
  draw("curves", rows, { $y_title: metric }, "Nothing was logged for this part.");
}

function drawDifferences() {
  const all = ofPart(data.differences);
  offer("differences", "reference", unique(all.map((row) => row.reference)), undefined, data.reference);
  const rows = all.filter((row) => row.reference === chosen("differences", "reference"));
  const named = rows.map((row) => ({ ...row, name: `less ${row.other}: ${row.cell}` }));
  draw("differences", named, {}, "No two methods of this part share two seeds.");
  const signed = (value) => `${value >= 0 ? "+" : "−"}${Math.abs(value).toFixed(2)}`;
  fill(at("differences-table"), ["cell", "less", "difference", "from", "to", "seeds", "p, Holm"], rows.map((row) => [
    row.cell, row.other, number(row.mean, signed(row.mean)), number(row.low, signed(row.low)),
    number(row.high, signed(row.high)), number(row.seeds), number(row.holm, row.holm < 0.001 ? "< 0.001" : row.holm.toFixed(3)),
  ]));
}

function drawRanks() {
  const ranks = data.ranks[part()];
  draw("ranks", ranks?.rows ?? [], {}, "Ranks need three methods with scores in the same two cells or more.");
  at("ranks-note").textContent = ranks
    ? `Over ${ranks.cells.length} cells: ${ranks.cells.join("; ")}. Critical difference ${ranks.distance.toFixed(2)}; `
      + `p of Friedman’s test that all rank alike ${ranks.p < 0.001 ? "< 0.001" : ranks.p.toFixed(3)}.`
    : "";
}

const number = (value, text) => ({ value, text: text ?? (value === undefined ? "–" : value.toLocaleString("en")) });

function fill(table, names, rows) {
  const head = element("thead", {}, element("tr", {}, ...names.map((name) => element("th", { scope: "col", textContent: name }))));
  const body = element("tbody", {}, ...rows.map((cells) => element("tr", {}, ...cells.map((cell) => {
    if (cell instanceof Node) return element("td", {}, cell);
    if (typeof cell === "string") return element("td", { textContent: cell });
    const td = element("td", { className: "number", textContent: cell.text });
    td.dataset.value = cell.value ?? "";
    return td;
  }))));
  table.replaceChildren(table.querySelector("caption"), head, body);
  table.closest(".scroll").hidden = rows.length === 0;
  sortable(table);
}

// A button in every heading sorts by its column, numbers by value; what is missing comes last.
function sortable(table) {
  const value = (row, column) => {
    const cell = row.cells[column];
    const text = cell.dataset.value ?? cell.textContent.trim();
    const numeric = parseFloat(text.replaceAll(",", "").replace("−", "-"));
    return { text, numeric, missing: text === "" || text === "–" };
  };
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const button = element("button", { type: "button", textContent: heading.textContent });
    heading.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const keyed = [...table.tBodies[0].rows].map((row) => [row, value(row, column)]);
      const numbers = keyed.every(([, key]) => key.missing || !Number.isNaN(key.numeric));
      keyed.sort(([, a], [, b]) => a.missing - b.missing || (down ? -1 : 1)
        * (numbers ? a.numeric - b.numeric : a.text.localeCompare(b.text, "en", { numeric: true })) || 0);
      table.tBodies[0].append(...keyed.map(([row]) => row));
    });
  });
}

function listRuns() {
  const differing = data.settings.differing.filter((key) => key !== "seed");
  const label = Object.fromEntries(ofPart(data.arms).flatMap((arm) => arm.runs.map((id) => [id, arm.label])));
  const rows = ofPart(data.runs);
  const cost = rows.some((run) => "train_seconds" in run);
  const names = ["run", "task", "model", "method", "budget", "seed", "status", "score", "rate", "trained parameters", "steps"];
  fill(at("runs-table"), [...names, ...(cost ? ["seconds", "MiB"] : [])], rows.map((run) => [
    element("a", { href: `#${address([run.id])}`, textContent: run.id.split("/").pop() }),
    run.task, run.model, label[run.id] ?? run.method, number(undefined, run.budget), number(run.seed), run.status,
    number(run.score, run.score === undefined ? "–" : `${run.score.toFixed(4)} ${run.metric}`),
    number(setting(run, "trainer.learning_rate"), String(setting(run, "trainer.learning_rate") ?? "–")), number(run.parameters), number(run.steps),
    ...(cost ? [number(run.train_seconds, run.train_seconds?.toFixed(0) ?? "–"),
      number(run.peak_memory_bytes, run.peak_memory_bytes ? (run.peak_memory_bytes / 2 ** 20).toFixed(0) : "–")] : []),
  ]));
  filterRuns();
}

function filterRuns() {
  const words = at("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = [...at("runs-table").tBodies[0].rows];
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
  }
  at("count").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} runs`;
}

function setting(run, key) {
  const column = Object.keys(data.settings.values).indexOf(key);
  const index = column < 0 ? -1 : data.settings.rows[runs.get(run.id).index][column];
  return index < 0 ? undefined : JSON.parse(data.settings.values[key][index]) ?? undefined;
}

// Records: #run=ID or #run=ID|ID… opens them.
const address = (ids) => `run=${ids.map(encodeURIComponent).join("|")}`;

function pairs(entries) {
  return element("dl", {}, ...entries.filter(([, value]) => value !== undefined && value !== "").flatMap(
    ([name, value]) => [element("dt", { textContent: name }), element("dd", { textContent: value })]));
}

function record(run) {
  const keys = Object.keys(data.settings.values);
  const settings = (wanted) => keys.map((key, column) => [key, data.settings.rows[run.index][column]])
    .filter(([key, index]) => index >= 0 && wanted(key)).map(([key, index]) => [key, data.settings.values[key][index]]);
  const differing = new Set(data.settings.differing);
  return [
    element("h3", { textContent: `Seed ${run.seed}: ${run.status}` }),
    pairs([
      ["signature", run.id.split("/").pop()], ["score", run.score && `${run.score} ${run.metric}`],
      ["trained parameters", run.parameters?.toLocaleString("en")], ["steps", run.steps], ["adapter, bytes", run.bytes?.toLocaleString("en")],
      ["seconds of training", run.train_seconds], ["peak memory, bytes", run.peak_memory_bytes?.toLocaleString("en")],
      ["device", run.device], ["commit", run.commit], ["error", run.error],
    ]),
    ...(run.command ? [element("pre", { textContent: run.command })] : []),
    ...(run.later ? [element("p", { textContent: `Settings that are newer than this record and take today’s defaults: ${run.later.join(", ")}.` })] : []),
    element("details", {}, element("summary", { textContent: "Metrics" }), pairs(Object.entries(run.metrics))),
    element("details", {}, element("summary", { textContent: "Settings that differ between runs" }), pairs(settings((key) => differing.has(key)))),
    element("details", {}, element("summary", { textContent: "All settings" }), pairs(settings(() => true))),
  ];
}

function showRecord() {
  const ids = /^#run=(.+)$/.exec(location.hash)?.[1].split("|").map(decodeURIComponent).filter((id) => runs.has(id)) ?? [];
  if (ids.length === 0) return;
  const of = ids.map((id) => runs.get(id));
  at("record-title").textContent = `${of[0].method}: ${of[0].cell}`;
  const seeds = of.map((run) => run.seed).join(",");
  const all = of.length > 1 && of[0].command
    ? [element("h3", { textContent: "All of them" }),
      element("pre", { textContent: `${of[0].command.replace("train.py", "train.py -m").replace(/ seed=\S+/, "")} seed=${seeds}` })]
    : [];
  at("record-content").replaceChildren(...all, ...of.flatMap(record));
  if (!at("record").open) at("record").showModal();
  at("record").scrollTop = 0;
  at("record-title").focus();
}

function show() {
  for (const block of document.querySelectorAll("[data-part]")) block.hidden = block.dataset.part !== part();
  for (const render of [drawPareto, drawBudgets, drawRates, drawCurves, drawDifferences, drawRanks, listRuns]) render();
}

at("part").value = data.first;
at("part").addEventListener("change", show);
at("filter").addEventListener("input", filterRuns);
for (const [id, render] of Object.entries({
  pareto: drawPareto, budgets: drawBudgets, rates: drawRates, curves: drawCurves, differences: drawDifferences })) {
  at(id).querySelector("form").addEventListener("change", render);
}
for (const form of document.querySelectorAll("form.controls")) form.addEventListener("submit", (event) => event.preventDefault());
for (const table of document.querySelectorAll("#scores table")) sortable(table);
at("record").addEventListener("close", () => history.replaceState(null, "", location.pathname + location.search));
addEventListener("hashchange", showRecord);
show();
showRecord();

const COLOURS = ["#1f6feb", "#d9730d", "#1a7f37", "#8250df", "#b42318", "#0e7490", "#a16207", "#57606a"];
const STACK = ["#1f6feb", "#54aeff", "#8c959f", "#d9730d", "#a475f9", "#57606a"];
// title, unit, names of metrics, or what gives them for a run; a name that ends in / stands for all inside it; stacked: one chart for each run
const CHARTS = [
  ["Accuracy", "", ["accuracy/"]],
  ["Loss", "nats", ["loss"]],
  ["Reverse KL", "nats", ["reverse_kl"]],
  ["Overlap", "share", ["overlap_mean"]],
  ["Budget and effective length", "tokens", ["budget", "effective_length_mean"]],
  ["Response length", "tokens", ["response_length_mean", "finished_length"]],
  ["Hit ratio", "share", ["hit_ratio"]],
  ["Entropy", "nats", ["entropy"]],
  ["Drift events", "per response", ["events_mean"]],
  ["Tokens of a step", "tokens", ["tokens_generated", "tokens_kept", "tokens_trained"]],
  ["How responses end", "responses", ["ended/"], "stacked"],
  ["Time of a step", "seconds", run => Object.keys(run.totals.phases), "stacked"],
  ["Memory", "GiB", ["memory_gib"]],
  ["Gradient norm", "", ["grad_norm"]],
  ["Learning rate", "", ["lr"]],
  ["Engine against trainer", "nats", ["rollout_logprob_gap_mean", "rollout_mismatch"]],
  ["Version lag", "steps", ["version_lag_mean", "version_lag_max"]],
  ["Reward", "", ["reward_mean"]],
  ["Overlap by teacher", "share", ["teachers/*/overlap_mean"]],
  ["Reverse KL by teacher", "nats", ["teachers/*/reverse_kl"]],
];

function named(run, patterns) {
  const series = run.series;
  if (typeof patterns === "function") patterns = patterns(run);
  const found = [];
  for (const pattern of patterns) {
    if (pattern.endsWith("/")) found.push(...Object.keys(series).filter(k => k.startsWith(pattern)));
    else if (pattern.includes("*")) {
      const [a, b] = pattern.split("*");
      found.push(...Object.keys(series).filter(k => k.startsWith(a) && k.endsWith(b)));
    } else if (series[pattern] && series[pattern].some(v => v !== null)) found.push(pattern);
  }
  return found;
}

function axis(run, kind) {
  if (kind === "step") return run.series.step || [];
  let sum = 0;
  const of = run.series[kind === "tokens" ? "tokens_generated" : "step_s"] || [];
  return of.map(v => sum += (v || 0) * run.every);
}

function smoothed(values) {
  return values.map((v, i) => {
    const near = values.slice(Math.max(0, i - 4), i + 1).filter(x => x !== null && x !== undefined);
    return v === null || !near.length ? v : near.reduce((a, b) => a + b, 0) / near.length;
  });
}

const LAYOUT = {
  margin: {l: 55, r: 12, t: 34, b: 36}, font: {family: "system-ui, sans-serif", size: 11}, legend: {orientation: "h", y: -0.18, font: {size: 10}},
  paper_bgcolor: "#fff", plot_bgcolor: "#fff", hovermode: "x unified", colorway: COLOURS,
};
const CONFIG = {displaylogo: false, responsive: true, modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"]};
const plain = text => visible(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;"); // plotly reads tags

function marks(runs, kind) {
  // restarts as dotted lines, before the first step that the new start has run
  const at = (run, step) => {
    const index = (run.series.step || []).findIndex(s => s >= step), xs = axis(run, kind);
    return index < 0 ? xs.at(-1) : kind === "step" ? step - 0.5 : index ? xs[index - 1] : 0;
  };
  return runs.flatMap((run, i) => run.starts.slice(1).map(start => ({
    type: "line", x0: at(run, start.step), x1: at(run, start.step), yref: "paper", y0: 0, y1: 1, line: {color: COLOURS[i % COLOURS.length], width: 1, dash: "dot"},
  })));
}

function alarms(run, xs, ys) {
  const at = run.events.filter(e => e.kind !== "warning").map(e => [e, (run.series.step || []).indexOf(e.step)]).filter(([, i]) => i >= 0 && ys[i] !== null);
  if (!at.length) return null;
  return {x: at.map(([, i]) => xs[i]), y: at.map(([, i]) => ys[i]), mode: "markers", marker: {symbol: "x", size: 8, color: "#b42318"}, name: "alarm", showlegend: false,
    text: at.map(([e]) => plain(`${e.kind}: ${e.text}`)), hovertemplate: "%{text}<extra></extra>"};
}

function chartsOf(runs) {
  const made = [];
  for (const [title, unit, patterns, stacked] of CHARTS) {
    if (stacked) {
      runs.forEach((run, r) => {
        if (named(run, patterns).length) made.push({title: runs.length > 1 ? `${title}: ${run.name}` : title, unit, draw: (kind, smooth) => traces([run], patterns, kind, smooth, true), runs: [run]});
      });
    } else if (runs.some(run => named(run, patterns).length)) {
      made.push({title, unit, draw: (kind, smooth) => traces(runs, patterns, kind, smooth, false), runs});
    }
  }
  return made;
}

function traces(runs, patterns, kind, smooth, stacked) {
  const lines = [], dashes = ["solid", "dash", "dot", "dashdot"];
  runs.forEach((run, r) => {
    const xs = axis(run, kind), names = named(run, patterns);
    names.forEach((name, n) => {
      const values = smooth ? smoothed(run.series[name]) : run.series[name], short = name.replace(/_s$/, "").replace(/^(accuracy|ended|teachers)\//, "");
      const gaps = values.some(v => v === null);
      lines.push({
        x: gaps ? xs.filter((_, i) => values[i] !== null) : xs, y: gaps ? values.filter(v => v !== null) : values, mode: gaps ? "lines+markers" : "lines",
        name: plain(runs.length > 1 ? (names.length > 1 ? `${run.name} ${short}` : run.name) : short),
        line: stacked ? {width: 0.5, color: STACK[n % STACK.length]} : {width: 1.6, color: COLOURS[(runs.length > 1 ? r : n) % COLOURS.length], dash: runs.length > 1 ? dashes[n % 4] : "solid"},
        ...(stacked ? {stackgroup: "one"} : {}),
      });
      if (!stacked && n === 0) { const x = alarms(run, xs, values); if (x) lines.push(x); }
    });
  });
  return lines;
}

function drawWhenSeen(box, draw) {
  const seen = new IntersectionObserver(entries => {
    if (entries.some(e => e.isIntersecting)) { seen.disconnect(); draw(); }
  }, {rootMargin: "200px"});
  seen.observe(box);
}

function drawCurves(runs) {
  const grid = document.getElementById("charts"), select = document.getElementById("axis"), smooth = document.getElementById("smooth");
  const charts = chartsOf(runs);
  if (!charts.length) grid.append(element("p", "No step has been finished yet.", "none"));
  for (const chart of charts) {
    const box = element("div", undefined, "chart");
    grid.append(box);
    const draw = () => Plotly.react(box, chart.draw(select.value, smooth.checked), {
      ...LAYOUT, title: {text: plain(chart.title), font: {size: 13}}, yaxis: {title: {text: chart.unit}, rangemode: "tozero", gridcolor: "#eef0f2"},
      xaxis: {title: {text: select.selectedOptions[0].textContent}, gridcolor: "#eef0f2"}, shapes: marks(chart.runs, select.value),
    }, CONFIG);
    let drawn = false;
    drawWhenSeen(box, () => { drawn = true; draw(); });
    for (const control of [select, smooth]) control.addEventListener("change", () => drawn && draw());
  }
}

function drawHeatmaps(run) {
  const grid = document.getElementById("heatmaps");
  grid.replaceChildren();
  const p = run.positions;
  if (!p) { grid.append(element("p", "This run has no positions.jsonl.", "none")); return; }
  const to = shade => [[0, "#ffffff"], [1, shade]];
  const maps = [["Overlap by position", p.overlap, [[0, "#b42318"], [0.5, "#f4e8b0"], [1, "#1a7f37"]], 1], ["Drift events per 100 tokens", p.events, to("#b42318"), null], ["Responses spent here", p.spent, to("#6639ba"), null], ["Tokens read", p.tokens, to("#0550ae"), null]];
  for (const [title, z, scale, high] of maps) {
    if (!z.some(row => row.some(v => v))) continue; // nothing but zeros
    const box = element("div", undefined, "chart");
    grid.append(box);
    drawWhenSeen(box, () => Plotly.newPlot(box, [{type: "heatmap", x: p.steps, y: p.at, z, colorscale: scale, zmin: 0, ...(high === null ? {} : {zmax: high}), colorbar: {thickness: 10},
      hovertemplate: "step %{x}, from token %{y}: %{z}<extra></extra>"}], {...LAYOUT, hovermode: "closest", title: {text: title, font: {size: 13}}, xaxis: {title: {text: "steps"}}, yaxis: {title: {text: "position in the response"}}}, CONFIG));
  }
}

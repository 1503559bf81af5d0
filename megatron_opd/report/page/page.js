(() => {
  const data = JSON.parse(document.getElementById("data").textContent), runs = data.runs, put = (id, ...nodes) => document.getElementById(id).append(...nodes);
  const last = (run, name) => { const values = (run.series[name] || []).filter(v => v !== null); return values.length ? values[values.length - 1] : null; };
  put("runs-table", table(["run", "state", "steps", "accuracy", "loss", "overlap", "budget", "time", "starts", "version", "device"], runs.map(run => [
    run.name, run.state, `${last(run, "step") ?? 0} of ${run.wanted ?? "?"}`, Object.entries(run.totals.accuracy).map(([k, v]) => `${k} ${(100 * v).toFixed(1)}%`).join(", ") || "\u2013",
    last(run, "loss"), last(run, "overlap_mean"), last(run, "budget"), duration(run.totals.seconds), run.starts.length,
    run.starts.length ? `${run.starts.at(-1).version} ${run.starts.at(-1).revision}` : "\u2013", run.totals.device ? `${run.totals.processes} x ${run.totals.device}` : "\u2013"])));
  const differ = Object.entries(data.settings.differ);
  if (runs.length > 1) put("differences", element("h3", "What the settings differ in"), differ.length ? table(["key", ...runs.map(r => r.name)], differ.map(([key, values]) => [key, ...values])) : element("p", "Nothing.", "none"));
  const said = runs.flatMap(run => [
    ...run.starts.slice(1).map(s => [run.name, s.step, "restart", `${s.time}${s.job ? ", job " + s.job : ""}`]),
    ...run.events.map(e => [run.name, e.step, e.kind, e.text])]);
  if (said.length) put("marks", element("h3", "Alarms, restarts and faults"), table(["run", "step", "what", ""], said.slice(0, 200)));
  const select = document.getElementById("drift-run");
  runs.forEach((run, i) => { const o = element("option", run.name); o.value = i; select.append(o); });
  const drift = () => {
    const run = runs[Number(select.value)];
    if (window.Plotly) drawHeatmaps(run);
    document.getElementById("groups").replaceChildren(...(run.groups.length ? [element("h3", "Recorded responses by source and teacher"), table(["source", "teacher", "responses", "length", "effective", "events", "overlap", "ended by itself", "cut", "stopped at drift"],
      run.groups.map(g => [g.source || "\u2013", g.teacher, g.responses, g.length, g.effective, g.events, g.overlap, g.ended.eos, g.ended.length, g.ended.drift]))] : []));
  };
  select.addEventListener("change", drift);
  select.value = String(Math.max(0, runs.findIndex(run => last(run, "overlap_mean") !== null))); // one that looks for drift
  drift();
  const share = (part, whole) => whole ? `${number(part)} (${(100 * part / whole).toFixed(1)}%)` : number(part);
  put("cost-table", table(["", ...runs.map(r => r.name)], [
    ["time of all steps", ...runs.map(r => duration(r.totals.seconds))],
    ["device hours", ...runs.map(r => r.totals.device_hours)],
    ["responses", ...runs.map(r => r.totals.responses)],
    ["tokens sampled", ...runs.map(r => r.totals.sampled)],
    ["tokens if every response ran to the largest budget", ...runs.map(r => r.totals.to_the_cap)],
    ["tokens saved against that", ...runs.map(r => r.totals.to_the_cap ? share(r.totals.to_the_cap - r.totals.sampled, r.totals.to_the_cap) : null)],
    ["tokens scored by the teacher", ...runs.map(r => share(r.totals.scored, r.totals.sampled))],
    ["tokens trained on", ...runs.map(r => share(r.totals.trained, r.totals.sampled))],
    ["tokens per second", ...runs.map(r => r.totals.tokens_per_s)],
    ...Object.keys(runs[0].totals.phases).map(p => [`time in ${p.replace(/_s$/, "")}`, ...runs.map(r => share(r.totals.phases[p], r.totals.seconds))]),
  ]));
  browse(runs);
  put("settings-table", table(["key", "value"], Object.entries(data.settings.same)));
  document.body.dataset.opened = "yes";
  // plotly takes a second to be read: what needs none of it is there before
  requestAnimationFrame(() => setTimeout(() => {
    const script = element("script");
    script.textContent = document.getElementById("plotly").textContent;
    document.head.append(script);
    drawCurves(runs);
    drawHeatmaps(runs[Number(select.value)]);
    document.body.dataset.ready = "yes";
  }));
})();

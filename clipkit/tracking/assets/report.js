"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const main = document.getElementById("main");
  const tip = document.getElementById("tip");
  const runs = Object.fromEntries(data.runs.map((run) => [run.label, run]));
  const configurations = Object.fromEntries(data.configurations.map((one) => [one.label, one]));
  const metrics = Object.fromEntries(data.metrics.map((metric) => [metric.name, metric]));
  const order = data.configurations.map((one) => one.label);
  const redraws = [];

  // --- Small things ----------------------------------------------------------------------------

  function el(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "class") node.className = value;
      else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else node.setAttribute(name, value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  }

  function draw(tag, attributes = {}, ...children) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }

  const colour = (label) => {
    const configuration = runs[label] ? runs[label].configuration : label;
    return `var(--c${order.indexOf(configuration) % 8})`;
  };
  // Runs of one configuration share its colour and differ in their dashes.
  const dashes = (label) => {
    const run = runs[label];
    if (!run) return order.indexOf(label) >= 8 ? "6 4" : "none";
    return ["none", "7 4", "2 4", "9 3 2 3", "4 3"][configurations[run.configuration].runs.indexOf(label) % 5];
  };
  const nameOf = (label) => (runs[label] || configurations[label]).name;
  const dot = (label) => {
    const node = el("span", { class: "dot" });
    node.style.background = colour(label);
    return node;
  };
  const key = (label, text = label) => el("span", { class: "key", title: nameOf(label) }, dot(label), el("span", {}, text));

  // Halves go to the even digit, as they do in the terminal's table.
  function fixed(value, digits) {
    const scaled = value * 10 ** digits;
    const down = Math.floor(scaled);
    return scaled - down === 0.5 && down % 2 === 0 ? (down / 10 ** digits).toFixed(digits) : value.toFixed(digits);
  }

  function number(value, about, sign = false) {
    if (value === null || value === undefined) return "–";
    const plus = sign && value > 0 ? "+" : "";
    let text;
    if (about.share) text = fixed(100 * value, 1);
    else if (/_rank$/.test(about.name || about.metric)) text = fixed(value, 1);
    else if (Math.abs(value) >= 1000 || (value !== 0 && Math.abs(value) < 0.001)) text = value.toPrecision(3);
    else text = value.toFixed(3);
    return plus + text.replace("-", "−");
  }
  const withInterval = (value, low, high, about, sign) =>
    low === null || low === undefined || high === null || high === undefined
      ? number(value, about, sign)
      : `${number(value, about, sign)} [${number(low, about, sign)}, ${number(high, about, sign)}]`;
  const probability = (p) => (p === null ? "–" : p < 0.001 ? "p < 0.001" : `p = ${p.toFixed(3)}`);
  const arrow = (about) => (about.higher_is_better === null ? "" : about.higher_is_better ? " ↑" : " ↓");
  const evaluation = (name) => name.slice(0, name.lastIndexOf("/"));
  const unit = (about) => (about.share ? " %" : "");

  function section(id, title, ...children) {
    const node = el("section", { id }, el("h2", {}, title), ...children);
    main.append(node);
    document.getElementById("nav").append(el("a", { href: `#${id}` }, title));
    return node;
  }

  function segments(options, chosen, choose) {
    const buttons = options.map(([value, text]) =>
      el("button", { type: "button", "aria-pressed": String(value === chosen), onclick: () => {
        buttons.forEach((one, at) => one.setAttribute("aria-pressed", String(options[at][0] === value)));
        choose(value);
      } }, text));
    return el("div", { class: "segments", role: "group" }, ...buttons);
  }

  function select(label, options, chosen, choose) {
    const node = el("select", { "aria-label": label, onchange: () => choose(node.value) });
    for (const [value, text] of options) node.append(el("option", { value }, text));
    node.value = chosen;
    return node;
  }

  function ticks(low, high, count) {
    const rough = (high - low) / Math.max(1, count);
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
    const found = [];
    for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at++) found.push(at * step);
    return found;
  }

  function span(values, pad = 0.06) {
    const known = values.filter((value) => value !== null && value !== undefined);
    let low = Math.min(...known);
    let high = Math.max(...known);
    if (!(high > low)) { low -= Math.abs(low) * 0.1 || 0.5; high += Math.abs(high) * 0.1 || 0.5; }
    return [low - pad * (high - low), high + pad * (high - low)];
  }

  function watch(node, paint) {
    let width = 0;
    const again = () => {
      const now = Math.round(node.clientWidth);
      if (now > 0 && now !== width) { width = now; paint(now); }
    };
    redraws.push(again);
    new ResizeObserver(again).observe(node);
  }

  // A row of a forest: an interval drawn against an axis that its panel shares.
  function plot([low, high], marks, height = 22) {
    const holder = el("div", { class: "plot" });
    watch(holder, (width) => {
      const x = (value) => 5 + ((value - low) / (high - low)) * (width - 10);
      const middle = height / 2;
      const svg = draw("svg", { height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
      for (const mark of marks) {
        if (mark.kind === "rule") svg.append(draw("line", { x1: x(mark.at), x2: x(mark.at), y1: 0, y2: height, stroke: "var(--mute)", "stroke-dasharray": mark.dash || "none" }));
        if (mark.kind === "bar") svg.append(draw("rect", { x: x(mark.from), y: middle - 5, width: Math.max(0, x(mark.to) - x(mark.from)), height: 10, rx: 3, fill: mark.colour, opacity: 0.25 }));
        if (mark.kind === "tick") svg.append(draw("line", { x1: x(mark.at), x2: x(mark.at), y1: middle - 8, y2: middle + 8, stroke: "var(--ink)", "stroke-width": 2 }));
        if (mark.kind === "interval") {
          if (mark.low !== null && mark.low !== undefined) svg.append(draw("line", { x1: x(mark.low), x2: x(mark.high), y1: middle, y2: middle, stroke: mark.colour, "stroke-width": mark.strong ? 3 : 2, "stroke-linecap": "round", opacity: mark.faint ? 0.55 : 1 }));
          svg.append(draw("circle", { cx: x(mark.value), cy: middle, r: mark.strong ? 5 : 4, fill: mark.hollow ? "var(--raised)" : mark.colour, stroke: mark.colour, "stroke-width": 2 }));
        }
        if (mark.kind === "axis") {
          const at = ticks(low, high, width > 260 ? 5 : 4);
          for (const value of at) svg.append(draw("text", { x: x(value), y: 13, "text-anchor": "middle" }, tickText(value, mark.about, at)));
        }
      }
      holder.replaceChildren(svg);
    });
    return holder;
  }

  function tickText(value, about, all) {
    const scaled = about.share ? 100 * value : value;
    const step = all.length > 1 ? Math.abs(all[1] - all[0]) * (about.share ? 100 : 1) : 1;
    if (Math.abs(scaled) >= 1e6) return `${+(scaled / 1e6).toFixed(2)}M`;
    if (Math.abs(scaled) >= 1e4) return `${+(scaled / 1e3).toFixed(1)}k`;
    const digits = Math.max(0, Math.min(6, Math.ceil(-Math.log10(step) - 1e-9) + (/^[25]/.test(String(step / 10 ** Math.floor(Math.log10(step)))) && step % 1 && String(+(step / 10 ** Math.floor(Math.log10(step))).toFixed(2)) === "2.5" ? 1 : 0)));
    return scaled.toFixed(digits).replace(/^-0(\.0*)?$/, "0").replace("-", "−");
  }

  // --- Summary ---------------------------------------------------------------------------------

  function summary() {
    const count = data.runs.length;
    document.title = `${data.title} – clipkit compare`;
    document.getElementById("title").textContent = data.title;
    const of = data.configurations.length === count ? "" : ` of ${data.configurations.length} configuration${data.configurations.length > 1 ? "s" : ""}`;
    const lead = document.getElementById("lead");
    lead.textContent = `${count} run${count > 1 ? "s" : ""}${of}; ${data.value_in_words}; intervals are 95 %.`;
    if (data.value === "best") lead.classList.add("warn");

    const node = section("summary", "Summary");
    const findings = findingsOf();
    if (findings.length) node.append(el("ul", { class: "findings" }, ...findings));
    const panels = el("div", { class: "panels" });
    for (const metric of data.metrics) {
      const panel = scorePanel(metric);
      if (panel) panels.append(panel);
    }
    const names = el("ul", { class: "names" });
    for (const run of data.runs) {
      const beside = [run.status === "finished" ? "" : run.status, run.seed === null ? "" : `seed ${run.seed}`, run.label === data.baseline ? "baseline" : ""].filter(Boolean).join(", ");
      names.append(el("li", {}, dot(run.label), el("b", {}, run.label), el("span", {}, run.name, beside ? el("span", { class: "sub" }, ` ${beside}`) : null)));
    }
    node.append(names, panels);
    for (const note of data.notes) node.append(el("p", { class: "note warn" }, note));
  }

  function findingsOf() {
    const found = [];
    const say = (claims, word) => {
      for (const claim of claims.made) {
        if (claim.verdict !== "better" && claim.verdict !== "worse") continue;
        const about = metrics[claim.metric];
        found.push([Math.abs(claim.difference), el("li", { class: claim.verdict },
          `As a ${word}, `, el("b", {}, claim.second), ` (${nameOf(claim.second)}) `, el("b", {}, claim.verdict === "better" ? "beats" : "falls behind"), " ", el("b", {}, claim.first), ` (${nameOf(claim.first)}): ${evaluation(claim.metric)} ${about.short} `,
          el("span", { class: "num" }, withInterval(claim.difference, claim.low, claim.high, about, true)),
          about.share ? " points, " : ", ", el("span", { class: "num" }, probability(claim.p_holm)))]);
      }
    };
    say(data.configuration_claims, "configuration");
    if (!found.length) say(data.checkpoint_claims, "checkpoint");
    const shown = found.slice(0, 5).map((pair) => pair[1]);
    const tests = data.configuration_claims.made.length + data.checkpoint_claims.made.length;
    if (!shown.length && tests) shown.push(el("li", {}, "No difference is significant after Holm's correction."));
    if (found.length > 5) shown.push(el("li", {}, `and ${found.length - 5} more, below`));
    return shown;
  }

  function scorePanel(metric) {
    const having = data.runs.filter((run) => run.scores[metric.name] && run.scores[metric.name].value !== null);
    if (!having.length) return null;
    const scores = having.map((run) => run.scores[metric.name]);
    const range = span(scores.flatMap((score) => [score.value, score.low, score.high]));
    const base = runs[data.baseline].scores[metric.name];
    const rule = base && base.value !== null && data.runs.length > 1 ? [{ kind: "rule", at: base.value, dash: "3 3" }] : [];
    const panel = el("div", { class: "panel" }, el("h3", {},
      el("span", { class: "sub" }, `${evaluation(metric.name)}  `), `${metric.short}${unit(metric)}${arrow(metric)}`));
    if (metric.chose_the_checkpoint) panel.append(el("p", { class: "note" }, "Measured on what chose the checkpoint, and flatters."));
    for (const one of data.configurations) {
      for (const label of one.runs) {
        const score = runs[label].scores[metric.name];
        if (!score || score.value === null) continue;
        panel.append(el("div", { class: "row" }, el("span", { class: "name" }, key(label)),
          plot(range, [...rule, { kind: "interval", ...score, colour: colour(label), faint: one.runs.length > 1 }]),
          el("span", { class: "num" }, withInterval(score.value, score.low, score.high, metric))));
      }
      const mean = one.means[metric.name];
      if (mean) panel.append(el("div", { class: "row mean" }, el("span", { class: "name" }, `${one.label} mean`),
        plot(range, [...rule, { kind: "bar", from: mean.mean - mean.sd, to: mean.mean + mean.sd, colour: colour(one.label) }, { kind: "interval", value: mean.mean, colour: colour(one.label), strong: true }]),
        el("span", { class: "num", title: "mean and standard deviation over the seeds" }, `${number(mean.mean, metric)} ± ${number(mean.sd, metric)}`)));
    }
    panel.append(el("div", { class: "row axis" }, el("span"), plot(range, [{ kind: "axis", about: metric }], 18), el("span")));
    return panel;
  }

  // --- Curves ----------------------------------------------------------------------------------

  const AXES = { step: "steps", samples: "samples", hours: "hours" };

  function curves() {
    if (!data.curves.length) return;
    const several = data.configurations.some((one) => one.runs.length > 1);
    const state = { metric: 0, axis: "step", band: several ? "seeds" : "interval", hidden: new Set() };
    const node = section("curves", "Curves");
    const chart = el("div", { id: "chart" });
    const legend = el("div", { class: "legend" });
    const picker = el("select", { "aria-label": "metric", onchange: () => { state.metric = Number(picker.value); paint(); } });
    const groups = new Map();
    data.curves.forEach((curve, at) => {
      if (!groups.has(curve.group)) groups.set(curve.group, el("optgroup", { label: curve.group }));
      groups.get(curve.group).append(el("option", { value: at }, `${curve.group}  ${curve.short}${arrow(curve)}`));
    });
    picker.append(...groups.values());
    picker.value = "0";
    const anySamples = data.curves.some((curve) => Object.values(curve.series).some((one) => one.samples.some((x) => x !== null)));
    const axes = Object.entries(AXES).filter(([axis]) => axis !== "samples" || anySamples);
    node.append(el("div", { class: "controls" }, picker,
      segments(axes, state.axis, (axis) => { state.axis = axis; paint(); }),
      segments([...(several ? [["seeds", "seeds"]] : []), ["interval", "intervals"], ["none", "lines only"]], state.band, (band) => { state.band = band; paint(); })));
    const note = el("p", { class: "note" });
    node.append(el("div", { class: "panel" }, chart, legend), note);

    let width = 0;
    watch(chart, (now) => { width = now; paint(); });
    function paint() {
      if (!width) return;
      const curve = data.curves[state.metric];
      const lines = state.band === "seeds" ? overSeeds(curve, state.axis) : perRun(curve, state.axis, state.band);
      const shown = lines.filter((line) => !state.hidden.has(line.label));
      chart.replaceChildren(lineChart(curve, shown, state.axis, width));
      legend.replaceChildren(...lines.map((line) => {
        const sample = draw("svg", { width: 22, height: 8 }, draw("line", { x1: 0, x2: 22, y1: 4, y2: 4, stroke: colour(line.label), "stroke-width": 2.5, "stroke-dasharray": dashes(line.label) }));
        const name = nameOf(line.label);
        return el("button", { type: "button", "aria-pressed": String(!state.hidden.has(line.label)), title: name, onclick: () => {
          if (!state.hidden.delete(line.label)) state.hidden.add(line.label);
          paint();
        } }, sample, el("span", {}, `${line.label}  ${name}${line.seeds > 1 ? ` (${line.seeds} seeds)` : ""}`));
      }));
      note.textContent = state.band === "seeds" ? "Line: mean of the seeds; band: from the lowest to the highest seed."
        : state.band === "interval" && lines.some((line) => line.band) ? "Band: 95 % interval of one evaluation." : "";
    }
  }

  function perRun(curve, axis, band) {
    return Object.entries(curve.series).map(([label, one]) => ({
      label, seeds: 1, band: band === "interval" && !!one.low,
      points: one.value.map((y, at) => ({ x: one[axis][at], y, low: band === "interval" && one.low ? one.low[at] : null, high: band === "interval" && one.high ? one.high[at] : null }))
        .filter((point) => point.x !== null && point.y !== null),
    }));
  }

  function overSeeds(curve, axis) {
    return data.configurations.map((one) => {
      const members = one.runs.filter((label) => curve.series[label]).map((label) => curve.series[label]);
      const byStep = new Map();
      for (const member of members) member.value.forEach((y, at) => {
        if (y === null || member[axis][at] === null) return;
        const step = member.step[at];
        if (!byStep.has(step)) byStep.set(step, []);
        byStep.get(step).push({ x: member[axis][at], y });
      });
      const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
      // A mean over fewer seeds than elsewhere would jump.
      const points = [...byStep.entries()].sort((a, b) => a[0] - b[0]).map((pair) => pair[1]).filter((all) => all.length >= members.length)
        .map((all) => ({ x: mean(all.map((p) => p.x)), y: mean(all.map((p) => p.y)), low: members.length > 1 ? Math.min(...all.map((p) => p.y)) : null, high: members.length > 1 ? Math.max(...all.map((p) => p.y)) : null }));
      return { label: one.label, seeds: members.length, band: members.length > 1, points };
    }).filter((line) => line.points.length);
  }

  function lineChart(curve, lines, axis, width) {
    const height = width < 500 ? 260 : 360;
    const margin = { left: 48, right: 14, top: 12, bottom: 40 };
    const all = lines.flatMap((line) => line.points);
    const svg = draw("svg", { height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${curve.metric} over ${AXES[axis]}` });
    if (!all.length) {
      svg.append(draw("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "nothing to draw"));
      return svg;
    }
    const [x0, x1] = span(all.map((point) => point.x), 0);
    const [y0, y1] = span(all.flatMap((point) => [point.y, point.low, point.high]), 0.05);
    const x = (value) => margin.left + ((value - x0) / (x1 - x0)) * (width - margin.left - margin.right);
    const y = (value) => height - margin.bottom - ((value - y0) / (y1 - y0)) * (height - margin.top - margin.bottom);
    const across = ticks(y0, y1, 5);
    for (const value of across) svg.append(
      draw("line", { x1: margin.left, x2: width - margin.right, y1: y(value), y2: y(value), stroke: "var(--grid)" }),
      draw("text", { x: margin.left - 8, y: y(value) + 4, "text-anchor": "end" }, tickText(value, curve, across)));
    const along = ticks(x0, x1, width < 500 ? 4 : 8);
    for (const value of along) svg.append(draw("text", { x: x(value), y: height - margin.bottom + 19, "text-anchor": "middle" }, tickText(value, {}, along)));
    svg.append(draw("line", { x1: margin.left, x2: width - margin.right, y1: height - margin.bottom, y2: height - margin.bottom, stroke: "var(--mute)" }),
      draw("text", { x: width - margin.right, y: height - 5, "text-anchor": "end" }, AXES[axis]));
    for (const line of lines) {
      if (line.band) {
        const known = line.points.filter((point) => point.low !== null && point.high !== null);
        const path = [...known.map((p) => `${x(p.x)},${y(p.high)}`), ...known.reverse().map((p) => `${x(p.x)},${y(p.low)}`)];
        svg.append(draw("polygon", { points: path.join(" "), fill: colour(line.label), opacity: lines.length > 5 ? 0.09 : 0.16 }));
      }
    }
    for (const line of lines) {
      svg.append(draw("polyline", { points: line.points.map((p) => `${x(p.x).toFixed(1)},${y(p.y).toFixed(1)}`).join(" "), fill: "none", stroke: colour(line.label), "stroke-width": 2, "stroke-linejoin": "round", "stroke-linecap": "round", "stroke-dasharray": dashes(line.label) }));
      if (line.points.length <= 30) for (const p of line.points) svg.append(draw("circle", { cx: x(p.x), cy: y(p.y), r: 2.5, fill: colour(line.label) }));
    }
    const guide = draw("line", { y1: margin.top, y2: height - margin.bottom, stroke: "var(--mute)", "stroke-dasharray": "3 3", visibility: "hidden" });
    svg.append(guide);
    const leave = () => { tip.hidden = true; guide.setAttribute("visibility", "hidden"); };
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const at = x0 + ((event.clientX - box.left - margin.left) / (width - margin.left - margin.right)) * (x1 - x0);
      const near = (points) => points.reduce((a, b) => (Math.abs(b.x - at) < Math.abs(a.x - at) ? b : a));
      const anchor = near(all).x;
      guide.setAttribute("x1", x(anchor));
      guide.setAttribute("x2", x(anchor));
      guide.setAttribute("visibility", "visible");
      const rows = lines.map((line) => [line.label, near(line.points)]).sort((a, b) => b[1].y - a[1].y).slice(0, 12)
        .map(([label, p]) => el("div", {}, key(label, `${label} ${nameOf(label)}`), el("span", { class: "num" }, withInterval(p.y, p.low, p.high, curve))));
      const where = axis === "hours" ? `${anchor.toPrecision(3)} hours` : `${Math.round(anchor).toLocaleString("en")} ${AXES[axis]}`;
      tip.replaceChildren(el("b", {}, where), ...rows);
      tip.hidden = false;
      const size = tip.getBoundingClientRect();
      const left = event.clientX + 18 + size.width > innerWidth ? event.clientX - 18 - size.width : event.clientX + 18;
      tip.style.left = `${Math.max(8, left)}px`;
      tip.style.top = `${Math.max(8, Math.min(event.clientY - size.height / 2, innerHeight - size.height - 8))}px`;
    });
    return svg;
  }

  // --- Differences -----------------------------------------------------------------------------

  function differences() {
    if (data.runs.length < 2) return;
    const node = section("differences", "Differences", el("p", { class: "note" },
      "Two claims that are never mixed. Filled: significant after Holm's correction over the comparisons of its kind."));
    claimPanel(node, "This checkpoint beats that one", data.checkpoint_claims, "rows");
    if (data.configurations.length > 1) claimPanel(node, "This configuration beats that one", data.configuration_claims, "seeds");
  }

  function claimPanel(node, title, claims, word) {
    const count = claims.comparisons;
    const panel = el("div", { class: "panel wide" }, el("h3", {}, title),
      el("p", { class: "note" }, `${claims.how}${count > 1 ? `; p after Holm over ${count} comparisons` : ""}.`));
    panel.style.marginTop = "14px";
    for (const metric of data.metrics) {
      const made = claims.made.filter((claim) => claim.metric === metric.name && claim.difference !== null);
      if (!made.length) continue;
      const [low, high] = span([0, ...made.flatMap((claim) => [claim.low, claim.high, claim.difference])]);
      panel.append(el("h3", {}, el("span", { class: "sub" }, `${evaluation(metric.name)}  `), `${metric.short}${metric.share ? ", points" : ""}${arrow(metric)}`));
      for (const claim of made) {
        const sure = claim.verdict !== "undecided";
        const shade = claim.verdict === "better" ? "var(--good)" : claim.verdict === "worse" ? "var(--bad)" : "var(--mute)";
        panel.append(el("div", { class: "row", title: `${nameOf(claim.second)} against ${nameOf(claim.first)}` },
          el("span", { class: "name" }, key(claim.second), el("span", { class: "sub" }, ` against ${claim.first}`)),
          plot([low, high], [{ kind: "rule", at: 0 }, { kind: "interval", value: claim.difference, low: claim.low, high: claim.high, colour: shade, hollow: !sure }]),
          el("span", { class: "num" }, withInterval(claim.difference, claim.low, claim.high, metric, true)),
          el("span", { class: `verdict num ${claim.verdict}`, title: `${claim.verdict}; ${claim.n} ${word}` }, probability(claim.p_holm))));
      }
      panel.append(el("div", { class: "row axis" }, el("span"), plot([low, high], [{ kind: "axis", about: metric }], 18), el("span"), el("span")));
    }
    for (const sentence of claims.not_offered) panel.append(el("p", { class: "note" }, `Not offered: ${sentence}.`));
    node.append(panel);
  }

  // --- Classes ---------------------------------------------------------------------------------

  function classes() {
    if (!data.classes.length) return;
    const node = section("classes", "Classes");
    const body = el("div");
    const options = data.classes.map((one, at) => [String(at), `${one.run} ${nameOf(one.run)} on ${one.evaluation}`]);
    const other = data.classes.findIndex((one) => one.run !== data.baseline);
    const first = String(Math.max(0, other));
    node.append(el("div", { class: "controls" }, select("run", options, first, paint)), body);
    paint(first);
    function paint(at) {
      const one = data.classes[Number(at)];
      const compared = one.worst.some((each) => each.base !== null);
      const about = { share: true, name: "" };
      const list = (title, items) => {
        const panel = el("div", { class: "panel" }, el("h3", {}, title));
        for (const each of items) {
          const marks = [{ kind: "interval", value: each.value, low: each.low, high: each.high, colour: colour(one.run) }];
          if (each.base !== null) marks.unshift({ kind: "tick", at: each.base });
          panel.append(el("div", { class: "row", title: `${each.name}: ${each.n} pictures` }, el("span", { class: "name" }, each.name), plot([0, 1], marks),
            el("span", { class: "num" }, withInterval(each.value, each.low, each.high, about))));
        }
        panel.append(el("div", { class: "row axis" }, el("span"), plot([0, 1], [{ kind: "axis", about }], 18), el("span", { class: "num" }, "top-1 %")));
        return panel;
      };
      const panels = el("div", { class: "panels" });
      if (one.best.length) panels.append(list("Worst classes", one.worst), list("Best classes", one.best));
      else panels.append(list(`All ${one.count} classes, the worst first`, one.worst));
      if (one.confusions.length) {
        const panel = el("div", { class: "panel pairs" }, el("h3", {}, "Most confused"));
        const most = Math.max(...one.confusions.map((pair) => pair.count));
        for (const pair of one.confusions) panel.append(el("div", { class: "row", title: `${pair.truth} taken for ${pair.predicted}` },
          el("span", { class: "name" }, pair.truth, el("span", { class: "sub" }, " → "), pair.predicted), plot([0, most * 1.02], [{ kind: "bar", from: 0, to: pair.count, colour: colour(one.run) }]),
          el("span", { class: "num" }, `${pair.count} (${(100 * pair.share).toFixed(0)} %)`)));
        panel.append(el("p", { class: "note" }, "How often, and the share of the true class."));
        panels.append(panel);
      }
      body.replaceChildren(panels);
      if (compared) body.append(el("p", { class: "note" }, `The upright tick is the baseline, ${data.baseline}.`));
      redraws.forEach((again) => again());
    }
  }

  // --- Examples --------------------------------------------------------------------------------

  function examples() {
    if (!data.examples.length) return;
    const node = section("examples", "Examples");
    const body = el("div");
    const options = data.examples.map((one, at) => [String(at), `${one.run} ${nameOf(one.run)} on ${one.evaluation}`]);
    node.append(el("div", { class: "controls" }, select("run", options, "0", paint)), body);
    paint("0");
    function paint(at) {
      const one = data.examples[Number(at)];
      const line = (tag, text) => el("div", {}, el("span", { class: "tag" }, tag), text);
      body.replaceChildren();
      for (const [right, title] of [[true, "Right"], [false, "Wrong"]]) {
        const items = one.items.filter((item) => item.right === right);
        if (!items.length) continue;
        body.append(el("h3", { class: right ? "better" : "worse" }, title), el("div", { class: "cards" }, ...items.map((item) => el("div", { class: "card" },
          el("img", { src: item.image, alt: item.truth, loading: "lazy" }),
          item.query !== null && item.query !== item.truth ? line("asked", item.query) : null,
          line("truth", item.truth),
          right ? null : line("found", item.found)))));
        body.lastChild.style.marginBottom = "20px";
      }
    }
  }

  // --- Configuration and environment -----------------------------------------------------------

  function table(head, rows) {
    const make = (row, tag) => el("tr", {}, ...row.map((cell, at) => el(at === 0 ? "th" : tag, { class: "code" }, cell ?? "–")));
    return el("div", { class: "scroll", tabindex: "0" }, el("table", {}, el("thead", {}, make(head, "th")), el("tbody", {}, ...rows.map((row) => make(row, "td")))));
  }

  function configuration() {
    const node = section("configuration", "Configuration");
    if (data.differing_params.length) {
      node.append(el("p", { class: "note" }, "What differs between the configurations."),
        table(["", ...data.configurations.map((one) => one.label)], data.differing_params.map((name) => [name, ...data.configurations.map((one) => one.params[name])])));
    } else {
      node.append(el("p", { class: "note" }, data.runs.length > 1 ? "No parameter that is known differs, but the seeds." : "One run."));
    }
    const known = data.runs.filter((run) => Object.keys(data.params[run.label]).length);
    if (known.length < 2) return;
    const options = known.map((run) => [run.label, `${run.label} ${run.name}`]);
    const other = known.find((run) => run.configuration !== known[0].configuration) || known[1];
    const state = { first: known[0].label, second: other.label };
    const body = el("div");
    node.append(el("h3", {}, "Two runs, key by key"), el("div", { class: "controls" },
      select("first run", options, state.first, (value) => { state.first = value; paint(); }), "and",
      select("second run", options, state.second, (value) => { state.second = value; paint(); })), body);
    node.querySelector("h3").style.marginTop = "20px";
    paint();
    function paint() {
      const [a, b] = [data.params[state.first], data.params[state.second]];
      const keys = [...new Set([...Object.keys(a), ...Object.keys(b)])].filter((name) => a[name] !== b[name]);
      body.replaceChildren(keys.length ? table(["", state.first, state.second], keys.map((name) => [name, a[name], b[name]])) : el("p", { class: "note" }, "Nothing differs."));
    }
  }

  function environment() {
    const known = data.runs.filter((run) => Object.keys(data.environment[run.label]).length);
    if (!known.length) return;
    const names = [...new Set(known.flatMap((run) => Object.keys(data.environment[run.label])))].sort();
    // Runs in the same surroundings share a column.
    const columns = new Map();
    for (const run of known) {
      const values = JSON.stringify(names.map((name) => data.environment[run.label][name] ?? null));
      columns.set(values, [...(columns.get(values) || []), run.label]);
    }
    const cells = [...columns.keys()].map((values) => JSON.parse(values));
    section("environment", "Environment", table(["", ...[...columns.values()].map((labels) => labels.join(" "))], names.map((name, at) => [name, ...cells.map((values) => values[at])])));
  }

  // --- The page --------------------------------------------------------------------------------

  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  root.dataset.theme = dark.matches ? "dark" : "light";
  dark.addEventListener("change", () => { root.dataset.theme = dark.matches ? "dark" : "light"; });
  document.getElementById("theme").addEventListener("click", () => { root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark"; });

  main.replaceChildren();
  for (const part of [summary, curves, differences, classes, examples, configuration, environment]) part();
  document.getElementById("footer").textContent = `clipkit compare, ${data.created.replace("T", " ").replace("+00:00", " UTC")}. 95 % intervals. A checkpoint claim speaks of these weights on these rows; a configuration claim of training again.`;
  root.dataset.ready = "true";
})();

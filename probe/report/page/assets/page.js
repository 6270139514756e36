// The slider, the metric, the theme, the width of plots and the downloads. What is drawn, Python has made: a panel's
// layouts, and its traces from each probed step on.
(async () => {
  "use strict";
  const packed = Uint8Array.from(atob(document.getElementById("page-data").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const page = JSON.parse(await new Response(stream).text());
  const [slider, label, metric, main, saturated] = ["step", "step-label", "metric", "main", "saturated"].map((id) =>
    document.getElementById(id),
  );
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const PRINT_WIDTH = 695; // A4 with margins of 12 mm, at 96 pixels an inch
  let printing = false;
  const all = (selector, each) => document.querySelectorAll(selector).forEach(each);
  const shownStep = () => page.steps[Number(slider.value)];
  const panels = () => page.panels[metric.value];
  // Of pairs [step, what holds from there on], ascending: at the shown step; the first where all are later.
  const latest = (states) => (states.findLast(([step]) => step <= shownStep()) ?? states[0])[1];

  function draw(name) {
    const { layouts, frames } = panels()[name];
    const plot = document.getElementById(`${name}-plot`);
    const width = printing ? PRINT_WIDTH : plot.clientWidth;
    const layout = structuredClone(layouts[width < 560 ? "narrow" : "wide"]);
    for (const shape of layout.shapes) if (shape.name === "cursor") shape.x0 = shape.x1 = shownStep();
    const isDark = dark.matches && !printing;
    const dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";
    Object.assign(layout, { template: page.templates[isDark ? "dark" : "light"], width, dragmode });
    let traces = JSON.stringify(latest(frames));
    if (isDark) for (const [from, to] of page.darkened) traces = traces.replaceAll(from, to);
    Plotly.react(plot, JSON.parse(traces), layout, { displayModeBar: false, scrollZoom: false });
  }

  const onScreen = (name) => {
    const box = document.getElementById(name).getBoundingClientRect();
    return box.bottom > 0 && box.top < innerHeight;
  };

  // Panels on the screen first, one a frame: the slider stays at hand. A later turn ends this one.
  let turn = 0;
  async function drawAll() {
    const mine = ++turn;
    main.setAttribute("aria-busy", "true");
    for (const name of Object.keys(panels()).sort((a, b) => onScreen(b) - onScreen(a))) {
      draw(name);
      await new Promise((drawn) => setTimeout(drawn));
      if (mine !== turn) return;
    }
    main.setAttribute("aria-busy", "false");
  }

  function show() {
    label.textContent = shownStep() < 0 ? "not known" : shownStep();
    slider.setAttribute("aria-valuetext", `step ${label.textContent}`);
    all(".panel", (panel) => (panel.querySelector(".state").textContent = latest(panels()[panel.id].titles)));
    saturated.hidden = !page.saturated[metric.value];
    saturated.textContent = page.saturated[metric.value];
    drawAll();
  }

  function download({ target }) {
    const { columns, rows } = page.tables[target.dataset.table];
    const quoted = (value) => (/[",\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : (value ?? ""));
    const text = [columns, ...rows].map((line) => line.map(quoted).join(",") + "\n").join("");
    const href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    Object.assign(document.createElement("a"), { href, download: `${target.dataset.table}.csv` }).click();
    setTimeout(() => URL.revokeObjectURL(href), 10000);
  }

  // Paper does not wait: all panels are drawn at once.
  function setPrinting(value) {
    if (printing === value) return;
    printing = value;
    Object.keys(panels()).forEach((name) => draw(name));
  }

  slider.addEventListener("input", show);
  metric.addEventListener("change", show);
  all("button[data-table]", (button) => button.addEventListener("click", download));
  dark.addEventListener("change", drawAll);
  matchMedia("print").addEventListener("change", (event) => setPrinting(event.matches));
  addEventListener("beforeprint", () => setPrinting(true));
  addEventListener("afterprint", () => setPrinting(false));
  let width = main.clientWidth;
  new ResizeObserver(() => {
    if (main.clientWidth !== width && !printing) drawAll();
    width = main.clientWidth;
  }).observe(main);
  show();
})();

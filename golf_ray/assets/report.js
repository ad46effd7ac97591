"use strict";
(() => {
  const root = document.documentElement;
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const { charts, tables } = read("data");
  const looks = read("looks");
  const views = new Map();

  // Theme: the reader's system says which, until the button does. ------------------------------

  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  const theme = () => root.dataset.theme || (dark.matches ? "dark" : "light");
  const name = () => {
    button.textContent = theme() === "dark" ? "Light theme" : "Dark theme";
    button.setAttribute("aria-pressed", String(theme() === "dark"));
  };
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = theme() === "dark" ? "light" : "dark";
    name();
    drawAll();
  });
  dark.addEventListener("change", () => {
    name();
    drawAll();
  });
  name();

  // Charts. A drawing that another overtakes gives up. ------------------------------------------

  let turn = 0;
  const rows = (table) =>
    tables[table].rows.map((row) =>
      Object.fromEntries(row.map((value, i) => [tables[table].columns[i], value])));

  async function draw(place) {
    const chart = charts[place.dataset.chart];
    const shown = theme();
    const spec = {
      ...structuredClone(chart.spec),
      datasets: Object.fromEntries(chart.data.map((table) => [table, rows(table)])),
    };
    const drawn = await vegaEmbed(place, spec, {
      mode: "vega-lite",
      renderer: "svg",
      config: looks[shown],
      tooltip: { theme: shown },
      actions: false,
    });
    const before = views.get(place);
    if (before) before.finalize();
    views.set(place, drawn);
    const picture = place.querySelector("svg.marks");
    if (picture) {
      picture.setAttribute("role", "img");
      picture.setAttribute("aria-labelledby", place.getAttribute("aria-labelledby"));
    }
  }

  async function drawAll() {
    const mine = ++turn;
    delete root.dataset.drawn;
    for (const place of document.querySelectorAll("[data-chart]")) {
      // The page can be read and used between two charts.
      await new Promise((done) => setTimeout(done));
      if (mine !== turn) return;
      try {
        await draw(place);
      } catch (error) {
        place.textContent = `This chart could not be drawn: ${error.message}`;
        console.error(error);
      }
    }
    root.dataset.drawn = theme();
    performance.mark("drawn");
  }

  for (const saver of document.querySelectorAll("[data-save]")) {
    saver.parentElement.hidden = false;
    saver.addEventListener("click", async () => {
      const place = saver.closest("figure").querySelector("[data-chart]");
      const drawn = views.get(place);
      if (!drawn) return;
      const link = document.createElement("a");
      link.href = await drawn.view.toImageURL(saver.dataset.save, 2);
      link.download = `${place.dataset.chart}.${saver.dataset.save}`;
      link.click();
    });
  }

  // Copying --------------------------------------------------------------------------------------

  for (const copier of document.querySelectorAll(".copier")) {
    copier.hidden = false;
    copier.addEventListener("click", async () => {
      const code = copier.parentElement.querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
        copier.textContent = "Copied";
      } catch {
        window.getSelection().selectAllChildren(code);
        copier.textContent = "Selected";
      }
      setTimeout(() => { copier.textContent = "Copy"; }, 2000);
    });
  }

  // The table of trials ----------------------------------------------------------------------------

  const table = document.getElementById("table");
  if (table) {
    const body = table.tBodies[0];
    const heads = [...table.tHead.rows[0].cells];
    const lines = [...body.rows];
    const filter = document.getElementById("filter");
    const status = document.getElementById("of-status");
    const said = document.getElementById("shown");
    const texts = new Map();
    const statusOf = (line) => line.cells[1].textContent;

    const value = (line, i, number) => {
      const cell = line.cells[i];
      const text = cell.dataset.v ?? cell.textContent;
      if (text === "") return null;
      return number ? Number(text) : text;
    };

    // Missing values come last, whichever way it is sorted.
    const sort = (i) => {
      const head = heads[i];
      const number = i === 0 || head.hasAttribute("data-number");
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const order = new Intl.Collator("en", { numeric: true });
      const keyed = lines.map((line, place) => ({ line, place, key: value(line, i, number) }));
      keyed.sort((a, b) => {
        if (a.key === null || b.key === null) {
          return (a.key === null) - (b.key === null) || a.place - b.place;
        }
        const by = number ? a.key - b.key : order.compare(a.key, b.key);
        return (down ? -by : by) || a.place - b.place;
      });
      body.append(...keyed.map(({ line }) => line));
    };
    heads.forEach((head, i) =>
      head.querySelector("button").addEventListener("click", () => sort(i)));

    const show = () => {
      const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      let count = 0;
      for (const line of lines) {
        if (!texts.has(line)) texts.set(line, line.textContent.toLowerCase());
        const kept = (!status.value || statusOf(line) === status.value)
          && words.every((word) => texts.get(line).includes(word));
        line.hidden = !kept;
        count += kept;
      }
      said.textContent = count === lines.length
        ? `${count.toLocaleString("en")} shown`
        : `${count.toLocaleString("en")} of ${lines.length.toLocaleString("en")} shown`;
    };
    filter.addEventListener("input", show);
    status.addEventListener("change", show);
    said.textContent = `${lines.length.toLocaleString("en")} shown`;
    document.querySelector(".tools").hidden = false;
  }

  drawAll();
})();

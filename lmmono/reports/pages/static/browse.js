// Browses the units of a hook in a notebook: an order, a number, one back, one on.
export default {
  render({ model, el }) {
    el.classList.add("am-pages");
    const bar = document.createElement("p");
    const order = document.createElement("select");
    order.setAttribute("aria-label", "Order of units");
    for (const name of Object.keys(model.get("orders"))) order.append(new Option(name, name));
    const number = document.createElement("input");
    number.type = "number";
    number.min = "0";
    number.setAttribute("aria-label", "Unit");
    const back = document.createElement("button");
    back.textContent = "Previous";
    const on = document.createElement("button");
    on.textContent = "Next";
    const place = document.createElement("span");
    place.className = "note";
    const page = document.createElement("div");
    page.setAttribute("aria-live", "polite");
    bar.append(order, " ", back, " ", number, " ", on, " ", place);
    el.append(bar, page);

    const units = () => model.get("orders")[order.value];
    const go = (unit) => {
      model.set("unit", unit);
      model.save_changes();
    };
    const step = (by) => {
      const at = units().indexOf(model.get("unit"));
      const next = units()[Math.min(Math.max(at + by, 0), units().length - 1)];
      if (next !== undefined) go(next);
    };
    const draw = () => {
      // escaped in Python, where it was made
      page.innerHTML = model.get("page");
      number.value = model.get("unit");
      place.textContent = `${units().indexOf(model.get("unit")) + 1} of ${units().length}`;
    };
    back.addEventListener("click", () => step(-1));
    on.addEventListener("click", () => step(1));
    order.addEventListener("change", () => go(units()[0]));
    number.addEventListener("change", () => {
      const unit = Number(number.value);
      if (Object.values(model.get("orders")).some((each) => each.includes(unit))) go(unit);
      else draw();
    });
    page.addEventListener("click", (event) => {
      const link = event.target.closest("a[href^='#']");
      if (!link) return;
      event.preventDefault();
      const unit = Number(link.getAttribute("href").split(":").at(-1));
      if (Number.isInteger(unit)) go(unit);
    });
    model.on("change:page", draw);
    model.on("change:unit", draw);
    draw();
  },
};

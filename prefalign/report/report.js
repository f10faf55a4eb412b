"use strict";
(() => {
  const controls = document.querySelector(".controls");
  if (!controls) return;
  const list = document.querySelector(".cards");
  const cards = [...list.querySelectorAll(".card")];
  const [search, flag, order] = ["search", "flag", "order"].map((id) => document.getElementById(id));
  const shown = document.getElementById("shown");
  const nothing = document.getElementById("nothing");
  const words = cards.map((card) => card.textContent.toLowerCase());
  const key = (card, name) => (card.dataset[name] === "" ? -Infinity : Number(card.dataset[name]));

  const filter = () => {
    const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    cards.forEach((card, i) => {
      const flags = card.dataset.flags.split("|").filter(Boolean);
      const flagged = !flag.value || (flag.value === "*" ? flags.length > 0 : flags.includes(flag.value));
      card.hidden = !(flagged && wanted.every((word) => words[i].includes(word)));
      count += !card.hidden;
    });
    shown.textContent = `${count} of ${cards.length} shown`;
    nothing.hidden = count > 0;
  };
  const sort = () => {
    const [name, direction] = order.value.split(" ");
    const sign = direction === "down" ? -1 : 1;
    [...cards].sort((a, b) => sign * (key(a, name) - key(b, name)) || key(a, "number") - key(b, "number"))
      .forEach((card) => list.append(card));
  };
  search.addEventListener("input", filter);
  flag.addEventListener("change", filter);
  order.addEventListener("change", sort);
  controls.hidden = false;
  // a browser keeps what was typed over a reload
  filter();
  sort();
})();

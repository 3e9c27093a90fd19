// Shows the cards that match every pressed filter button and the text in the search field.
(() => {
  const form = document.getElementById("filters");
  const cards = [...document.querySelectorAll("article")];
  const search = form.querySelector("input");
  const chosen = {};

  function show() {
    const query = search.value.toLowerCase();
    let count = 0;
    for (const card of cards) {
      const matches = Object.entries(chosen).every(([name, value]) => !value || card.dataset[name] === value)
        && card.textContent.toLowerCase().includes(query);
      card.hidden = !matches;
      count += matches;
    }
    form.querySelector("output").textContent = `${count} shown`;
    document.getElementById("no-match").hidden = count > 0;
  }

  form.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const group = button.closest("fieldset");
    for (const other of group.querySelectorAll("button")) other.setAttribute("aria-pressed", other === button);
    chosen[group.dataset.filter] = button.dataset.value;
    show();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  search.addEventListener("input", show);
  show();
})();

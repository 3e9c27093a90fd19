// Shows the cards that fit every pressed filter button and the words in the search field.
(() => {
  const form = document.getElementById("filters");
  const cards = [...document.querySelectorAll("article")];
  const search = form.querySelector("input");
  const chosen = {};

  function show() {
    const words = search.value.toLowerCase();
    let count = 0;
    for (const card of cards) {
      const fits = Object.entries(chosen).every(([name, value]) => !value || card.dataset[name] === value)
        && card.textContent.toLowerCase().includes(words);
      card.hidden = !fits;
      count += fits;
    }
    form.querySelector("output").textContent = `${count} shown`;
    document.getElementById("nothing").hidden = count > 0;
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

for (const example of document.querySelectorAll(".example")) {
  const words = [...example.querySelectorAll("button")];
  const show = (word) => {
    example.style.setProperty("--i", word.dataset.map);
    example.querySelector(".shown").textContent = word.textContent;
    words.forEach((other) => other.setAttribute("aria-pressed", other.dataset.map === word.dataset.map));
  };
  for (const word of words)
    for (const event of ["mouseenter", "focus", "click"]) word.addEventListener(event, () => show(word));
}

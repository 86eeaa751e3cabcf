// Every word that is shown: its contrast with what lies behind it (WCAG 2.2), its size on the screen, and whether it lies
// on another; every section of the contents that shows nothing below its heading.
// What is folded up is unfolded first.
(() => {
  for (const closed of document.querySelectorAll("details")) closed.open = true;
  const channels = colour => colour.match(/[\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b]
    .map(c => c / 255)
    .map(c => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = channels(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const result = { words: 0, pale: [], tiny: [], overlapping: [], empty: [], page: luminance(behind(document.body)) };
  const placed = [];
  const place = node => {
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const box of range.getClientRects()) {
      const other = placed.find(({ rect: r }) =>
        Math.min(r.right, box.right) - Math.max(r.left, box.left) > 1.5 &&
        Math.min(r.bottom, box.bottom) - Math.max(r.top, box.top) > 1.5);
      if (other) result.overlapping.push(`${other.words} | ${node.data}`);
      placed.push({ rect: box, words: node.data });
    }
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const box = element.getBoundingClientRect();
    if (!walker.currentNode.data.trim() || !box.width || element.tagName === "title") continue;
    result.words += 1;
    place(walker.currentNode);
    const style = getComputedStyle(element);
    const svg = element.closest("svg");
    const [low, high] = [luminance(channels(svg ? style.fill : style.color)), luminance(behind(element))].sort((a, b) => a - b);
    if ((high + 0.05) / (low + 0.05) < 4.5) result.pale.push(walker.currentNode.data);
    const zoom = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    if (parseFloat(style.fontSize) * zoom < 10) result.tiny.push(walker.currentNode.data);
  }
  for (const link of document.querySelectorAll("nav a")) {
    const section = document.querySelector(link.getAttribute("href"));
    const last = section && section.lastElementChild.getBoundingClientRect();
    if (!last || last.height < 10 || section.children.length < 2) result.empty.push(link.textContent);
  }
  return result;
})()

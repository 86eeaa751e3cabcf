// KaTeX typesets what arithmatex marked; loaded after this file, it is there once a page is.
document$.subscribe(({ body }) => {
  if (window.renderMathInElement) {
    renderMathInElement(body, {
      delimiters: [
        { left: "\\(", right: "\\)", display: false },
        { left: "\\[", right: "\\]", display: true },
      ],
    });
  }
});

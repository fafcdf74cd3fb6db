// Mends what Gradio's own markup gets wrong for screen readers, as it appears on the page.
(() => {
  const mend = () => {
    // a list whose children are buttons and no items
    document.querySelectorAll('.examples[role="list"]').forEach((list) => list.setAttribute('role', 'group'));
  };
  new MutationObserver(mend).observe(document.documentElement, { childList: true, subtree: true });
})();

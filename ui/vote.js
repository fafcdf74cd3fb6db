// The buttons below an answer: a thumb, and the better answer. What was voted lies in the browser under the answer's id, and is
// drawn from there, whatever Gradio makes anew of the conversation. It goes to the service one after the other, whole each time:
// of a person the newest counts.
window.vote = (() => {
  const KEPT = 'shoal-votes';
  const OF = 'answer-'; // what the class begins with that ends in the answer's id
  const MOST = 300; // votes, and characters of better answers, that the browser keeps
  const CHARACTERS = 200_000;
  const LONGEST = 65_536; // characters that the service takes
  const THANKS = 'Thank you.';
  const NOT_KEPT = 'What was asked here was not kept, so nothing could be learned from a better answer. Tick “Keep what is written '
    + 'here”, and ask again.';
  const pending = new Map(); // id -> what was voted and has not been taken yet
  const said = new Map(); // id -> what is said beside the buttons
  const queue = []; // [id, vote]
  let sending; // of these
  let writing; // id of the answer that is being corrected, and what the model said
  let before;

  const kept = () => {
    try {
      const found = JSON.parse(localStorage.getItem(KEPT));
      return Array.isArray(found) ? found.filter((one) => typeof one?.id === 'string') : [];
    } catch {
      return [];
    }
  };
  const of = (id, votes = kept()) => pending.get(id) ?? votes.find((one) => one.id === id) ?? {};

  const keep = (id, vote) => {
    const votes = [{ id, ...vote }, ...kept().filter((one) => one.id !== id)].filter((one) => one.rating || one.correction).slice(0, MOST);
    while (votes.length > 1 && votes.reduce((sum, one) => sum + (one.correction?.length ?? 0), 0) > CHARACTERS) votes.pop();
    try {
      localStorage.setItem(KEPT, JSON.stringify(votes));
    } catch { /* a browser without room: the service has it */ }
  };

  const set = (element, name, value) => { if (element && element.getAttribute(name) !== value) element.setAttribute(name, value); };
  const write = (element, text) => { if (element && element.textContent !== text) element.textContent = text; };

  const idOf = (group) => [...group.classList].find((name) => name.startsWith(OF))?.slice(OF.length) ?? '';
  const groupOf = (id) => [...document.querySelectorAll('.votes')].find((group) => idOf(group) === id);

  const draw = () => {
    const groups = document.querySelectorAll('.votes');
    const votes = groups.length ? kept() : [];
    groups.forEach((group) => {
      const answer = idOf(group);
      set(group, 'aria-label', 'Your vote on this answer');
      const { rating, correction } = of(answer, votes);
      for (const name of ['up', 'down']) {
        const button = group.querySelector(`.${name}`);
        set(button, 'aria-label', button?.title);
        set(button, 'aria-pressed', String(rating === name));
      }
      write(group.querySelector('.better'), correction ? 'Change your better answer' : 'Write the better answer');
      const { text = '', fault = false } = said.get(answer) ?? {};
      write(group.querySelector('.told'), text);
      set(group.querySelector('.told'), 'class', fault ? 'told fault' : 'told');
    });
  };

  const pump = () => {
    if (sending || !queue.length) return;
    sending = queue.shift();
    document.querySelector('#cast').click();
  };

  const cast = (id, changed) => {
    const { rating = null, correction = null } = of(id);
    const vote = { rating, correction, ...changed };
    pending.set(id, vote);
    said.delete(id);
    queue.push([id, vote]);
    draw();
    pump();
  };

  // The end of a vote: taken, or why not. A newer one on the same answer may be on its way already.
  const end = (fault) => {
    if (!sending) return;
    const [id, vote] = sending;
    sending = undefined;
    if (!fault) keep(id, vote);
    if (pending.get(id) === vote) {
      pending.delete(id);
      said.set(id, fault ? { text: fault, fault: true } : { text: vote.rating || vote.correction ? THANKS : 'Taken back.' });
    }
    draw();
    pump();
  };

  // --- what Gradio calls

  const next = () => JSON.stringify({ id: sending?.[0], ...sending?.[1] });
  const told = (reply) => { end(JSON.parse(reply).fault); };
  const lost = () => { end('The vote did not arrive. Try it again.'); };

  // Opens the box for the better answer, which begins with what the model said.
  const open = (shown) => {
    const mark = ` ${OF}${writing}"`;
    const message = (shown ?? []).find(({ role, content }) => role === 'assistant' && content.some(({ text }) => text?.includes(mark)));
    if (!message) return;
    const box = dialog();
    const may = groupOf(writing)?.classList.contains('kept');
    box.querySelector('.note').textContent = may ? 'It is kept with the question, and the model can learn from it.' : NOT_KEPT;
    box.querySelector('label').hidden = !may;
    box.querySelector('[type=submit]').hidden = !may;
    box.querySelector('[value=cancel]').textContent = may ? 'Cancel' : 'Close';
    before = (message.metadata?.log ?? '').split('\x1e').pop();
    box.querySelector('textarea').value = of(writing).correction ?? before;
    box.showModal();
    box.querySelector(may ? 'textarea' : '[value=cancel]').focus();
  };

  // ---

  const dialog = () => {
    const known = document.getElementById('better-answer');
    if (known) return known;
    const box = document.createElement('dialog');
    box.id = 'better-answer';
    box.setAttribute('aria-labelledby', 'better-title');
    box.innerHTML = `<form method="dialog"><h2 id="better-title">Write the better answer</h2><p class="note"></p>
      <label>The better answer<textarea rows="8" maxlength="${LONGEST}"></textarea></label>
      <p class="row"><button type="button" value="cancel">Cancel</button><button type="submit" value="send">Send</button></p></form>`;
    box.querySelector('[value=cancel]').addEventListener('click', () => box.close());
    box.addEventListener('close', () => {
      if (box.open) return; // the event comes some time after the end, and the box may be open again by then
      const id = writing;
      const text = box.querySelector('textarea').value.trim();
      const sent = box.returnValue === 'send';
      box.returnValue = '';
      groupOf(id)?.querySelector('.better').focus(); // also where it was drawn anew meanwhile
      if (!sent || text === before.trim()) return; // the model's own words, which nobody changed, are no better answer
      // who writes a better one says that this one is not good, unless it was said to be
      cast(id, text ? { correction: text, rating: of(id).rating ?? 'down' } : { correction: null });
    });
    document.querySelector('.contain').append(box);
    return box;
  };

  document.addEventListener('click', (event) => {
    const button = event.target.closest?.('.votes button');
    if (!button) return;
    const answer = idOf(button.closest('.votes'));
    if (button.classList.contains('better')) {
      writing = answer;
      document.querySelector('#correct').click(); // by which Gradio gives the conversation to `open`
      return;
    }
    const rating = button.classList.contains('up') ? 'up' : 'down';
    cast(answer, { rating: of(answer).rating === rating ? null : rating });
  });
  window.addEventListener('storage', draw); // another tab
  new MutationObserver(draw).observe(document.documentElement, { childList: true, subtree: true });
  return { next, told, lost, write: open };
})();

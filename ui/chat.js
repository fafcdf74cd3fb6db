// What a chat page does without the service: a question goes from the box into the conversation, the box is locked until the answer
// has come, and what is known of an answer that did not is said. So the page holds all of a conversation, and the service nothing.
window.chat = (() => {
  const WRITE = 'Write a message';
  const STOPPED = 'Stopped before the first word.';
  const FAILED = 'No answer came. Ask it again.';
  let stopped = false; // by the user, the answer that comes

  const update = (values) => ({ __type__: 'update', ...values });
  const locked = { interactive: false, placeholder: '', submit_btn: false, stop_btn: true };
  const free = { interactive: true, placeholder: WRITE, submit_btn: true, stop_btn: false };
  const words = (text) => ({ type: 'text', text });
  const message = (role, content, metadata = null) => ({ role, content, metadata, options: null });
  const lastQuestion = (shown) => (shown ?? []).findLastIndex(({ role }) => role === 'user');

  const busy = () => document.querySelector('#message .stop-button') !== null;
  const refuse = () => { throw new Error('nothing to ask, or too early'); }; // by which Gradio goes no further, and says nothing

  const ask = (box, shown) => {
    const files = (box?.files ?? []).map((file) => ({ type: 'file', file, alt_text: null }));
    const text = box?.text?.trim() ? [words(box.text)] : [];
    if (busy() || (!files.length && !text.length)) return refuse();
    stopped = false;
    return [[...(shown ?? []), message('user', [...files, ...text])], update({ ...locked, value: { text: '', files: [] } })];
  };

  // The last question is asked again.
  const retry = (shown) => {
    if (busy()) return refuse();
    stopped = false;
    return [shown.slice(0, lastQuestion(shown) + 1), update(locked)];
  };

  // The last question goes back into the box.
  const undo = (shown) => {
    const at = lastQuestion(shown);
    if (busy() || at < 0) return [shown, update({})];
    const { content } = shown[at];
    const text = content.filter(({ type }) => type === 'text').map((part) => part.text).join('\n');
    const files = content.filter(({ type }) => type === 'file').map((part) => part.file);
    return [shown.slice(0, at), update({ value: { text, files } })];
  };

  const stop = () => { stopped = true; };

  // Another conversation comes when the answer of this one, which is being cancelled, has come to its end: its words would come into it.
  const leave = async () => {
    for (let tries = 0; busy() && tries < 200; tries += 1) await new Promise((done) => { setTimeout(done, 25); });
  };

  // An answer has come to its end, was stopped, or failed: what the page shows of it is marked so, and the box is free again.
  const ended = (shown) => {
    const before = shown ?? [];
    const last = before.at(-1);
    const why = stopped ? STOPPED : FAILED;
    const none = message('assistant', [words(`<div class="${stopped ? 'facts' : 'fault'}" role="status">${why}</div>`)], { id: 'fault' });
    if (!last) return [before, update(free)];
    if (last.role === 'user') return [[...before, none], update(free)];
    const begun = last.content.some(({ text }) => text?.startsWith('<div class="waiting"')) && last.metadata?.id === 'fault';
    if (begun) return [[...before.slice(0, -1), none], update(free)];
    const [said, below] = last.content; // as `said` in talk.py made them; what the model said is left alone
    if (!below) return [before, update(free)];
    const known = below.text.replace(/<div class="waiting".*?<\/div>/, '').replace('<div class="sofar">', '<div class="sofar stopped">');
    return [[...before.slice(0, -1), { ...last, content: [said, words(known)] }], update(free)];
  };

  return { ask, retry, undo, stop, leave, ended };
})();

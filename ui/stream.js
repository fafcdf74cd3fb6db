// Sees to it that what is asked is answered, also where the service is replaced meanwhile. Gradio's client (6.31) asks by POST and
// reads all answers in one stream, which the server ends when none is due. What the client asks before it has read of that end gets
// no stream; and it leaves a stream when the page is about to go, though it may stay, which makes the server forget what is due. So
// the client reads a stream of ours: it goes on while an answer is due, through as many of the server's as that takes.
// A service that does not answer is tried until it does, and the page says so. What was due is then asked again, of a service that may
// know nothing of this page: all that a question needs goes with it. The client itself would load the page anew, and lose what stands
// in its boxes; it is only told the words of the answer that came in the end.
(() => {
  const plain = window.fetch;
  const encoder = new TextEncoder();
  const LONGEST = 2000; // ms between two tries
  const TRIES = 5; // for a question that fails again and again while the service answers others
  const LOST = 'The connection to the service is lost. It is tried again every two seconds, and goes on by itself.';
  const unasked = new Set(); // questions that the service has not taken yet
  const due = new Map(); // id that the client knows -> question that is not answered yet
  const renamed = new Map(); // id that the server knows -> question, where the client knows another
  const stale = new Set(); // ids of the server whose answers nobody waits for
  const early = new Map(); // id of an answer that came before the reply to its question -> whether it was complete
  let stream; // that the client reads: { out: its controller, left: resolves when the client takes it for ended }
  let following = false; // whether the server's streams are being read
  let noticed; // resolves when the client knows of the last end
  let root; // URL of the first page
  let away; // while the service does not answer: resolves when it does

  const sleep = (ms) => new Promise((done) => { setTimeout(done, ms); });
  const tell = (message) => stream.out.enqueue(encoder.encode(`data: ${JSON.stringify(message)}\n\n`));
  const done = () => Response.json({ success: true });
  const post = (name, body) => new Request(`${root}/gradio_api/${name}`, {
    method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(body),
  });

  // The line on top of the page; empty for none.
  const say = (text) => {
    let line = document.getElementById('away');
    if (!line) {
      if (!text) return;
      line = document.createElement('div');
      line.id = 'away';
      line.setAttribute('role', 'status');
      document.body.prepend(line);
    }
    if (line.textContent !== text) line.textContent = text; // a reader of the screen hears it once
  };

  // The reply to a request; none where there is no service, or one that is about to go or has not come yet.
  const reach = async (request) => {
    try {
      const reply = await plain(request);
      if (reply.status === 401) location.reload(); // to the login: the key is one no more, or there are keys now
      return reply.status >= 500 || reply.status === 404 ? undefined : reply;
    } catch {
      return undefined;
    }
  };

  const back = () => {
    away ??= (async () => {
      for (let wait = LONGEST / 8; ; wait = Math.min(2 * wait, LONGEST)) {
        await sleep(wait);
        if (await reach(new Request(`${root}/gradio_api/app_id`, { cache: 'no-store' }))) break;
        say(LOST);
      }
      say('');
      away = undefined;
    })();
    return away;
  };

  // The reply to a request however long the service is away, while it is `wanted`.
  const send = async (request, wanted = () => true) => {
    for (let tries = 1; wanted(); tries += 1) {
      const reply = await (tries < TRIES ? reach(request.clone()) : plain(request.clone()));
      if (reply) return reply;
      if (tries > 1) await sleep(LONGEST); // something answers, but not this
      await back();
    }
    return undefined;
  };

  const ask = async (request) => {
    const { fn_index, session_hash } = await request.clone().json();
    const question = { request, fn_index, unwanted: false, told: false, anew: false, tries: 1 };
    unasked.add(question);
    const reply = await send(request, () => !question.unwanted);
    unasked.delete(question);
    const { event_id: id } = reply?.ok ? await reply.clone().json() : {};
    if (question.unwanted) {
      if (id) {
        stale.add(id);
        reach(post('cancel', { event_id: id, fn_index, session_hash }));
      }
      return new Promise(() => {}); // the client has forgotten that it asked
    }
    if (id) {
      if (!early.get(id)) due.set(id, Object.assign(question, { id, now: id, told: early.has(id) }));
      early.delete(id);
    }
    await noticed; // else the client would look for the answer in a stream that has ended
    return reply;
  };

  // Asks what is due again, of a service that answers now.
  const askAgain = async () => {
    for (const question of [...due.values()]) {
      const { id, request } = question;
      renamed.delete(question.now);
      stale.add(question.now);
      question.tries += 1;
      const reply = question.unwanted || question.tries > TRIES ? undefined : await send(request, () => !question.unwanted);
      if (reply?.ok && !question.unwanted) {
        question.now = (await reply.json()).event_id;
        question.anew = question.told;
        renamed.set(question.now, question);
      } else {
        due.delete(id);
        const output = { error: 'The service did not answer this.' };
        if (!question.unwanted) tell({ msg: 'process_completed', event_id: id, success: false, output });
      }
    }
  };

  // What the user has stopped is not asked again, nor asked at all if the service was away.
  const cancel = async (request) => {
    const body = await request.json();
    const question = due.get(body.event_id) ?? [...unasked].find((asked) => !body.event_id && asked.fn_index === body.fn_index);
    if (question) question.unwanted = true;
    if (!body.event_id) return done();
    const reply = away ? undefined : await reach(post('cancel', { ...body, event_id: question?.now ?? body.event_id }));
    if (!reply) due.delete(body.event_id);
    return reply ?? done();
  };

  // Passes a message of the server on, under the id that the client knows.
  const pass = (message) => {
    const { msg, event_id: id } = message;
    const complete = msg === 'process_completed';
    if (stale.has(id)) return;
    const question = renamed.get(id) ?? due.get(id);
    if (!question) {
      if (complete || msg === 'process_generating') early.set(id, complete);
      tell(message);
      return;
    }
    if (complete) {
      due.delete(question.id);
      renamed.delete(id);
    }
    if (question.unwanted) return; // what the server had sent before it knew: the client waits for none of it any more
    if (msg === 'process_generating') {
      // the client takes all but the first for changes of what it was told before
      if (question.anew && message.output.data) message.output.data = message.output.data.map((value) => [['replace', [], value]]);
      question.told = true;
      question.anew = false;
    }
    tell({ ...message, event_id: question.id });
  };

  // Passes one of the server's streams on, but for the message that it has ended.
  const passOn = () => {
    let rest = '';
    let ended = false;
    return new WritableStream({
      write(text) {
        const messages = (rest + text).split('\n\n');
        rest = messages.pop();
        for (const line of messages) {
          const message = JSON.parse(line.replace('data: ', ''));
          if (message.msg === 'unexpected_error') throw new TypeError('the server ends, or knows nothing of this page');
          ended = message.msg === 'close_stream';
          if (!ended) pass(message);
        }
      },
      close() {
        if (!ended) throw new TypeError('the stream of answers was cut off');
      },
    });
  };

  // Whether one of the server's streams came to its end.
  const read = async (request) => {
    const reply = await reach(request.clone());
    if (!reply?.ok) return false;
    try {
      await reply.body.pipeThrough(new TextDecoderStream()).pipeTo(passOn());
      return true;
    } catch {
      return false;
    }
  };

  const follow = async (request) => {
    following = true;
    while (due.size) {
      if (await read(request)) continue;
      await back();
      await askAgain();
    }
    tell({ msg: 'close_stream' });
    stream.out.close();
    noticed = stream.left;
    following = false;
  };

  const upload = async (resource, options) => {
    const request = new Request(resource, options);
    try {
      return await plain(request.clone());
    } catch {
      await back();
      return plain(request);
    }
  };

  window.fetch = async (resource, options) => {
    const { href, pathname } = new URL(resource.url ?? resource, location.href);
    if (!pathname.includes('/gradio_api/')) return plain(resource, options);
    [root] = href.split('/gradio_api/');
    const name = pathname.split('/gradio_api/')[1];
    if (name === 'upload') return upload(resource, options);
    if (name === 'queue/join') return ask(new Request(resource, options));
    if (name === 'cancel') return cancel(new Request(resource, options));
    if (name === 'reset') return (await reach(new Request(resource, options))) ?? done();
    if (name.startsWith('run/')) return send(new Request(resource, options));
    if (name !== 'queue/data') return plain(resource, options);
    const { signal } = resource;
    Object.defineProperty(resource, 'signal', { value: null }); // by which the client would stop reading
    const left = new Promise((resolve) => signal.addEventListener('abort', resolve));
    const body = new ReadableStream({ start: (out) => { stream = { out, left }; } });
    if (!following) follow(new Request(resource, { signal: null }));
    return new Response(body);
  };
})();

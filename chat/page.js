// What Gradio's components lack: files pasted and dropped anywhere, a camera on computers, a conversation to download.
(() => {
  const find = (selector) => document.querySelector(selector);
  const make = (tag, properties) => Object.assign(document.createElement(tag), properties);
  const plain = (text) => text.replaceAll('\u2060', '');  // with which the server keeps HTML and foreign images text
  let arriving = 0, line = Promise.resolve();

  function give(files) {  // one after the other, because the server limits the size of one request
    for (const file of files) {
      arriving += 1;
      line = line.then(async () => {
        const dataTransfer = new DataTransfer();
        dataTransfer.items.add(file);
        const count = () => document.querySelectorAll('#composer .thumbnail-item').length, before = count();
        find('#composer [role=group]').dispatchEvent(Object.assign(new DragEvent('drop', {dataTransfer}), {given: true}));
        for (let tries = 0; find('#composer .loader') || (count() <= before && tries < 60); tries += 1)  // or it is refused
          await new Promise((done) => setTimeout(done, 50));
        arriving -= 1;
      });
    }
  }
  function instead(event, action) {
    event.preventDefault();
    event.stopPropagation();
    action();
  }
  function take(event, files) {
    const given = [...(files || [])];
    if (event.type === 'change') event.target.value = '';  // the same file may be chosen again
    if (given.length && !event.given) instead(event, () => give(given));
  }
  function wait(event) {  // a question does not leave without its files
    if (arriving) instead(event, () => line.then(() => find('#composer .submit-button')?.click()));
  }
  const on = (name, handler) => document.addEventListener(name, handler, true);
  on('paste', (event) => event.clipboardData.getData('text') || take(event, event.clipboardData.files));
  on('dragover', (event) => event.preventDefault());
  on('drop', (event) => take(event, event.dataTransfer.files));
  on('change', (event) => event.target.matches('#composer input[type=file]') && take(event, event.target.files));
  on('copy', (event, text = `${getSelection()}`) => plain(text) === text
    || instead(event, () => event.clipboardData.setData('text/plain', plain(text))));
  const clipboard = navigator.clipboard, write = clipboard?.writeText;
  if (write) clipboard.writeText = (text) => write.call(clipboard, plain(text));
  on('click', (event) => event.target.closest('#composer .submit-button') && wait(event));
  on('keypress', (event) => event.key === 'Enter' && !event.shiftKey && event.target.closest('#composer') && wait(event));

  async function camera() {
    const film = await navigator.mediaDevices?.getUserMedia({video: {facingMode: 'environment'}}).catch(() => null);
    if (!film) {  // none, or not allowed: a phone offers its own
      const input = make('input', {type: 'file', accept: 'image/*', capture: 'environment'});
      input.onchange = () => give([...input.files]);
      return input.click();
    }
    const dialog = make('dialog', {id: 'film', ariaLabel: 'Camera'});
    dialog.innerHTML = '<video autoplay playsinline muted></video><button>Take the picture</button> <button>Cancel</button>';
    const [video, shoot, cancel] = dialog.children;
    video.srcObject = film;
    shoot.onclick = () => {
      const canvas = make('canvas', {width: video.videoWidth, height: video.videoHeight});
      canvas.getContext('2d').drawImage(video, 0, 0);
      canvas.toBlob((blob) => give([new File([blob], 'camera.jpg', {type: 'image/jpeg'})]), 'image/jpeg', 0.95);
      dialog.close();
    };
    cancel.onclick = () => dialog.close();
    dialog.onclose = () => { film.getTracks().forEach((track) => track.stop()); dialog.remove(); };
    document.body.append(dialog);
    dialog.showModal();
  }
  function download(messages) {
    const said = (part) => part.type === 'text' ? plain(part.text) : '[picture]';
    const text = messages.map(({role, content}) => `**${role === 'user' ? 'You' : 'Answer'}:** ${content.map(said).join('\n')}\n`);
    const file = new Blob([text.join('\n')], {type: 'text/markdown'});
    make('a', {href: URL.createObjectURL(file), download: 'conversation.md'}).click();
  }
  window.jnana = {camera, download};

  const NAMES = {'#composer textarea': 'Question', '#camera': 'Take a picture', '#chat .image-container > button': 'Enlarge'};
  setInterval(() => {  // what screen readers need
    for (const selector in NAMES) for (const element of document.querySelectorAll(selector)) element.ariaLabel = NAMES[selector];
    for (const element of document.querySelectorAll('.examples, .thumbnails, .thumbnail-wrapper')) element.role = 'group';
  }, 500);
})();

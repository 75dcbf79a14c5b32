// Verifies signed URLs of Tollgate without the database: docs/signed-urls.md defines the form, vectors.json tests this.
// For Node and, in its subset of the language, for njs: see nginx.js.

// biome-ignore lint/style/useNodejsImportProtocol: njs does not know it
import crypto from 'crypto'

const ORIGIN = /^(https?):\/\/([a-z0-9_-]+(?:\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\])(:[1-9][0-9]{0,4})?(\/[^?]*)?(?:\?(.*))?$/i
const FORMS = {
  exp: /^[1-9][0-9]{0,11}$/,
  headers: /^[A-Za-z0-9_-]+$/,
  key: /^[A-Za-z0-9_-]+$/,
  methods: /^[A-Z]{1,16}(\.[A-Z]{1,16}){0,8}$/,
  nbf: /^[1-9][0-9]{0,11}$/,
  net: /^([0-9a-f]{8}|[0-9a-f]{32})-[0-9]{1,3}$/,
  once: /^[0-9a-f]{32}$/,
  prefix: /^[1-9][0-9]{0,3}$/,
  sig: /^[A-Za-z0-9_-]{43}$/,
  sub: /^[A-Za-z0-9_-]+$/,
}

function normalised(text) {
  return text.replace(/%([0-9A-Fa-f]{2})|[^A-Za-z0-9._~!$&'()*+,;=:@/?%-]/g, (found, digits) => {
    const code = digits ? parseInt(digits, 16) : found.charCodeAt(0)
    const meant = String.fromCharCode(code)
    return /[A-Za-z0-9._~-]/.test(meant) ? meant : `%${code < 16 ? '0' : ''}${code.toString(16).toUpperCase()}`
  })
}

// An address in hexadecimal digits: 8, or 32 of an IPv6 address that is no IPv4 address in another form.
function digitsOf(address) {
  const hex = (number, width) => `0000${number.toString(16)}`.slice(-width)
  const v4 = (text) =>
    text.replace(/(\d+)\.(\d+)\.(\d+)\.(\d+)$/, (_, a, b, c, d) => [a, b, c, d].map((n) => hex(+n, 2)).join(''))
  if (address.indexOf(':') < 0) return v4(address)
  const halves = v4(address).split('::')
  const groups = (half) =>
    (half || '').split(':').map((group) => (group.length === 8 ? group : group && hex(parseInt(group, 16), 4)))
  const first = groups(halves[0]).join('')
  const last = groups(halves[1]).join('')
  const digits = first + '0'.repeat(32 - first.length - last.length) + last
  return digits.indexOf('00000000000000000000ffff') === 0 ? digits.slice(24) : digits
}

function contains(network, address) {
  const parts = network.split('-')
  const bits = (digits) => digits.replace(/./g, (digit) => `000${parseInt(digit, 16).toString(2)}`.slice(-4)).slice(0, +parts[1])
  const digits = digitsOf(address)
  return digits.length === parts[0].length && bits(digits) === bits(parts[0])
}

function isSame(one, other) {
  let difference = one.length ^ other.length
  for (let i = 0; i < one.length; i++) difference |= one.charCodeAt(i) ^ other.charCodeAt(i)
  return difference === 0
}

// url: absolute, as the client sent it; client: its address; now: seconds since 1970; keys: an exported key for each key id.
// Returns a code, and what was signed: a subject, and headers that the response must have.
function verify(url, method, client, now, keys) {
  const found = url.length <= 8192 && !/[^!-~]|[\\#]|%(?![0-9A-Fa-f]{2})|%00/.test(url) && ORIGIN.exec(url)
  if (!found) return { code: 'MALFORMED' }
  const scheme = found[1].toLowerCase()
  const port = found[3] === (scheme === 'http' ? ':80' : ':443') ? '' : found[3] || ''
  const path = normalised(found[4] || '/')
  const parts = normalised(found[5] || '')
    .split('&')
    .filter((part) => part)
  const ours = parts.filter((part) => part.indexOf('tgu_') === 0).sort()
  const nameOf = (part) => part.split('=')[0]
  const compare = (a, b) => (a.name < b.name ? -1 : a.name > b.name ? 1 : a.at - b.at)
  const theirs = parts
    .filter((part) => part.indexOf('tgu_') !== 0)
    .map((part, at) => ({ part, at, name: nameOf(part) }))
    .sort(compare)
    .map((one) => one.part)
  const given = {}
  let isWellFormed = !/\/\.\.?(;|%3B|\/|$)/.test(path)
  ours.forEach((part) => {
    const name = nameOf(part).slice(4)
    const value = part.slice(name.length + 5)
    const form = Object.keys(FORMS).indexOf(name) >= 0 && FORMS[name]
    // biome-ignore lint/complexity/useOptionalChain: older versions of njs do not know it
    isWellFormed = isWellFormed && form && form.test(value) && given[name] === undefined
    given[name] = value
  })
  if (!isWellFormed || !given.exp || !given.key || !given.methods || !given.sig) return { code: 'MALFORMED' }
  if (Object.keys(keys).indexOf(given.key) < 0) return { code: 'UNKNOWN_KEY' }

  const length = path[+given.prefix - 1] === '/' ? +given.prefix : 0
  const signed = ours.filter((part) => part.indexOf('tgu_sig=') !== 0)
  const origin = `${scheme}://${found[2].toLowerCase()}${port}`
  const lines = ['tollgate-url-1', origin, path.slice(0, length || path.length), theirs.join('&'), signed.join('&')]
  const mac = crypto.createHmac('sha256', Buffer.from(keys[given.key], 'base64url')).update(lines.join('\n')).digest('base64url')
  if (!isSame(mac, given.sig)) return { code: 'BAD_SIGNATURE' }

  const text = (value) => Buffer.from(value, 'base64url').toString()
  const is = (code) => ({
    code,
    subject: given.sub ? text(given.sub) : null,
    headers: given.headers ? JSON.parse(text(given.headers)) : {},
  })
  if (now >= +given.exp) return is('EXPIRED')
  if (given.nbf && now < +given.nbf) return is('NOT_YET_VALID')
  if (length && /[%;]/.test(path.slice(length))) return is('PATH_NOT_ALLOWED')
  if (given.methods.split('.').indexOf(method) < 0) return is('METHOD_NOT_ALLOWED')
  if (given.net && !(client && contains(given.net, client))) return is('IP_NOT_ALLOWED')
  // Only the database can count uses.
  return is(given.once ? 'SINGLE_USE' : 'VALID')
}

export default { verify }

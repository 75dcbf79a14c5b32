// verify.mjs: gives tokens to Node's libraries, as a resource server would, by the key set of their issuer.
//
// Reads {jwks, issuer, audience, tokens: {name: {token, algorithm}}} from standard input. With `bare`, only the signature and
// the form are checked, by jose, with the one key of the algorithm. Prints {library: {name: the subject, true, or null if
// refused}}. The reasons go to standard error.
import { createPublicKey } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { createVerifier } from 'fast-jwt'
import { createLocalJWKSet, decodeProtectedHeader, jwtVerify } from 'jose'
import jsonwebtoken from 'jsonwebtoken'
import * as oauth from 'oauth4webapi'

const { jwks, issuer, audience, tokens } = JSON.parse(readFileSync(0, 'utf8'))

const imported = (jwk) => createPublicKey({ key: jwk, format: 'jwk' })
const named = (token) => imported(jwks.keys.find((jwk) => jwk.kid === decodeProtectedHeader(token).kid))

async function withJose(token, algorithm) {
  const options = { issuer, audience, algorithms: [algorithm], typ: 'at+jwt', requiredClaims: ['exp', 'iat', 'sub'] }
  return (await jwtVerify(token, createLocalJWKSet(jwks), options)).payload
}

function withJsonwebtoken(token, algorithm) {
  return jsonwebtoken.verify(token, named(token), { algorithms: [algorithm], issuer, audience })
}

function withFastJwt(token, algorithm) {
  const key = named(token).export({ type: 'spki', format: 'pem' })
  const rules = { allowedIss: issuer, allowedAud: audience, checkTyp: 'at+jwt', requiredClaims: ['exp', 'iat', 'sub'] }
  return createVerifier({ key, algorithms: [algorithm], ...rules })(token)
}

function withOauth4webapi(token, algorithm) {
  const server = { issuer, jwks_uri: 'https://a.example/jwks.json' }
  const request = new Request('https://api.example/', { headers: { authorization: `Bearer ${token}` } })
  const fetched = async () => new Response(JSON.stringify(jwks), { headers: { 'content-type': 'application/json' } })
  const options = { [oauth.customFetch]: fetched, signingAlgorithms: [algorithm] }
  return oauth.validateJwtAccessToken(server, request, audience, options)
}

async function withJoseBare(token, algorithm) {
  const key = imported(jwks.keys.find((jwk) => jwk.alg === algorithm))
  await jwtVerify(token, key, { algorithms: [algorithm] })
  return { sub: true }
}

const libraries = process.argv.includes('bare')
  ? { jose: withJoseBare }
  : { jose: withJose, jsonwebtoken: withJsonwebtoken, 'fast-jwt': withFastJwt, oauth4webapi: withOauth4webapi }

const found = {}
for (const [library, verify] of Object.entries(libraries)) {
  found[library] = {}
  for (const [name, { token, algorithm }] of Object.entries(tokens)) {
    try {
      found[library][name] = (await verify(token, algorithm)).sub
    } catch (error) {
      console.error(library, name, String(error).slice(0, 200))
      found[library][name] = null
    }
  }
}
console.log(JSON.stringify(found))

// run.mjs SECTION [careless]: runs what docs/drivers.md shows for a driver of Node, taken from there as example.mjs.
//
// Prints one line for each token: the titles, or the status and why it was refused; then the type that retry_after has, and
// the seconds. The error texts go to standard error, where no token may appear, unless the careless way is asked for.
import 'reflect-metadata'
import pg from 'pg'
import postgres from 'postgres'
import { DataSource } from 'typeorm'
import * as example from './example.mjs'

const { URL: url, CARELESS } = process.env
const ADDRESS = '203.0.113.7'
const LOSE = 'SELECT pg_terminate_backend(pg_backend_pid())'
const WAIT = `SELECT retry_after, extract(epoch FROM retry_after)::float8 AS seconds FROM tollgate.verify_api_token($1)`

async function attempt(name, call) {
  try {
    console.log(name, JSON.stringify(await call()))
  } catch (error) {
    console.error(error, JSON.stringify(error), error.stack)
    const refused = example.refusal(error)
    console.log(name, ...(refused ? [refused.status, JSON.stringify(refused)] : ['no refusal']))
  }
}

const type = (value) => (Object(value) === value ? value.constructor.name : typeof value)

async function check(posts, wait, lose) {
  for (const name of ['good', 'revoked', 'narrow', 'limited', 'limited']) {
    await attempt(name, () => posts(process.env[name.toUpperCase()]))
  }
  const [{ retry_after, seconds }] = await wait(process.env.LIMITED)
  console.log('retry_after', type(retry_after), type(seconds), seconds)
  await attempt('lost', lose)
}

const sections = {
  async 'node-postgres'(careless) {
    const pool = new pg.Pool({ connectionString: url })
    pool.on('error', () => {})
    if (careless) await example.carelessPosts(pool, CARELESS)
    const wait = async (token) => (await pool.query(WAIT, [token])).rows
    await check(
      (token) => example.posts(pool, token, ADDRESS),
      wait,
      () => pool.query(LOSE),
    )
    await pool.end()
  },
  async 'postgres.js'(careless) {
    if (careless) await example.carelessPosts(url, CARELESS)
    const sql = postgres(url, { prepare: false })
    await check(
      (token) => example.posts(sql, token, ADDRESS),
      (token) => sql.unsafe(WAIT, [token]),
      () => sql.unsafe(LOSE),
    )
    await sql.end({ timeout: 1 })
  },
  async typeorm(careless) {
    const source = await new DataSource({ type: 'postgres', url }).initialize()
    if (careless) await example.carelessPosts(source, CARELESS)
    const wait = (token) => source.query(WAIT, [token])
    await check(
      (token) => example.posts(source, token, ADDRESS),
      wait,
      () => source.query(LOSE),
    )
    await source.destroy()
  },
}

const [section, mode] = process.argv.slice(2)
await sections[section](mode === 'careless')

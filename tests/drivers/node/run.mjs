// run.mjs SECTION [careless]: runs what docs/drivers.md shows for a driver of Node, taken from there as example.mjs.
//
// Prints one line for each token: the titles, or the status and why it was refused. The error texts go to standard error,
// where no token may appear, unless the careless way is asked for.
import 'reflect-metadata'
import pg from 'pg'
import postgres from 'postgres'
import { DataSource } from 'typeorm'
import * as example from './example.mjs'

const { URL: url, CARELESS } = process.env
const ADDRESS = '203.0.113.7'
const LOSE = 'SELECT pg_terminate_backend(pg_backend_pid())'

async function attempt(name, call) {
  try {
    console.log(name, JSON.stringify(await call()))
  } catch (error) {
    console.error(error, JSON.stringify(error), error.stack)
    const refused = example.refusal(error)
    console.log(name, ...(refused ? [refused.status, JSON.stringify(refused)] : ['no refusal']))
  }
}

async function check(posts, lose) {
  for (const name of ['good', 'revoked', 'narrow', 'limited', 'limited']) {
    await attempt(name, () => posts(process.env[name.toUpperCase()]))
  }
  await attempt('lost', lose)
}

const sections = {
  async 'node-postgres'(careless) {
    const pool = new pg.Pool({ connectionString: url })
    pool.on('error', () => {})
    if (careless) await example.carelessPosts(pool, CARELESS)
    await check((token) => example.posts(pool, token, ADDRESS), () => pool.query(LOSE))
    await pool.end()
  },
  async 'postgres.js'(careless) {
    if (careless) await example.carelessPosts(url, CARELESS)
    const sql = postgres(url, { prepare: false })
    await check((token) => example.posts(sql, token, ADDRESS), () => sql.unsafe(LOSE))
    await sql.end({ timeout: 1 })
  },
  async typeorm(careless) {
    const source = await new DataSource({ type: 'postgres', url }).initialize()
    if (careless) await example.carelessPosts(source, CARELESS)
    await check((token) => example.posts(source, token, ADDRESS), () => source.query(LOSE))
    await source.destroy()
  },
}

const [section, mode] = process.argv.slice(2)
await sections[section](mode === 'careless')

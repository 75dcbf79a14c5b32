//! The steps, in the order of a token's life.

mod exchange;
mod quota;
mod services;
mod signed;
mod urls;

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tokio::task::JoinSet;
use tokio_postgres::{Client, Config, GenericClient, IsolationLevel};
use tollgate_core::token::{self, ENTROPY_LEN, Prefix};
use uuid::Uuid;

use crate::report::{Report, seconds};
use crate::tail::Tail;
use crate::{NO_TOLLGATED, connect, owner, tollgated};

const APP: &str = "tollgate_demo_app";
const ISSUER: &str = "tollgate_demo_issuer";
const ANN: &str = "demo:ann";
const BEN: &str = "demo:ben";
const READ: &str = "demo:posts:read";
const WRITE: &str = "demo:posts:write";
const MODERATE: &str = "demo:posts:moderate";

const DEFINE: &str = "select tollgate.define_scope($1, $2)";
const CREATE: &str =
    "select id, token, hint from tollgate.create_api_token(user_id => $1, name => $2, scopes => $3,
    expires_in => make_interval(secs => $4), allowed_ips => $5::text[]::cidr[])";
const VERIFY: &str = "select * from tollgate.verify_api_token($1, required_scopes => $2, client_ip => $3)";
const AUTHENTICATE: &str = "select user_id from tollgate.authenticate($1)";
const POSTS: &str = "select id from tollgate_demo.posts order by id";
const WRITE_POST: &str = "insert into tollgate_demo.posts (author, title, published) values ($1, $2, true)";
const FORGE: &str = "select set_config('tollgate.context', $1, $2)";
const REVOKE: &str = "select tollgate.revoke_api_token($1, user_id => $2, reason => $3)";

const CONNECTIONS: i64 = 4;
const CALLS: i64 = 1000;
/// One call out of this many requires a scope that the token lacks.
const REFUSED_EVERY: i64 = 9;

/// Addresses at which an application might see its clients: ranges reserved for documentation (RFC 5737).
const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 7));
const STRANGER: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 7));
const OFFICE: &str = "203.0.113.0/24";

const LIFETIME: Duration = Duration::from_secs(2);
// The daemon reports every 10 s, flushes and records expiries every 5 s, and publishes events within one.
const DAEMON_DEADLINE: Duration = Duration::from_secs(30);
const EVENT_DEADLINE: Duration = Duration::from_secs(15);
const PAUSE: Duration = Duration::from_millis(50);

pub(crate) async fn walk(report: &mut Report) -> Result<()> {
    let config = owner()?;
    let owner = connect(&config).await?;
    announce(report, &owner).await?;
    owner.batch_execute(include_str!("app.sql")).await.context("cannot make the application of the walk")?;
    let ordinary = Ordinary::passwords(&config, &owner).await?;
    let mut walk = Walk {
        issuer: ordinary.connect(ISSUER).await?,
        app: ordinary.connect(APP).await?,
        superuser: config,
        ordinary,
        owner,
        report,
    };

    walk.application().await?;
    walk.define_scopes().await?;
    let mut tokens = walk.issue().await?;
    walk.verify(&mut tokens).await?;
    walk.read_posts(&mut tokens).await?;
    walk.forge(&mut tokens).await?;
    walk.count_usage(&mut tokens).await?;
    // From the last event so far, not from now: the child may need a moment to start.
    let mut tail = Tail::follow(walk.last_event().await?)?;
    walk.revoke(&tokens, &mut tail).await?;
    walk.expire(&mut tail).await?;
    walk.spend_a_quota().await?;
    walk.sessions(&mut tail).await?;
    walk.withdraw_a_key().await?;
    walk.trust_another_issuer().await?;
    walk.service_account().await?;
    walk.call_for_a_user().await?;
    walk.sign_urls().await?;
    walk.status()
}

async fn announce(report: &Report, owner: &Client) -> Result<()> {
    let row = owner
        .query_one(
            "select (select extversion from pg_extension where extname = 'tollgate'), current_setting('server_version'), \
                 current_database()::text, rolsuper from pg_roles where rolname = current_user",
            &[],
        )
        .await?;
    let extension: Option<String> = row.get(0);
    let extension = extension.context("the extension is not in this database: run `make up`")?;
    let superuser: bool = row.get(3);
    ensure!(
        superuser,
        "the walk makes roles and tries to forge an identity as a superuser: DATABASE_URL must be one's"
    );
    let (server, database): (String, String) = (row.get(1), row.get(2));
    report.title(
        "Tollgate, end to end",
        &format!("extension {extension}, PostgreSQL {server}, database {database}"),
    );
    report.aside(
        "Each step shows the statements that it sends, with bind parameters, over ordinary connections.",
    );
    report.aside(
        "SQLSTATEs of what is refused: 22023 a bad value, 28000 not authenticated, 42501 not permitted.",
    );
    Ok(())
}

/// How the ordinary roles connect.
struct Ordinary {
    config: Config,
}

impl Ordinary {
    /// A password for this walk only, which expires soon after it.
    async fn passwords(superuser: &Config, owner: &Client) -> Result<Self> {
        let password = Uuid::new_v4().simple().to_string();
        let until: String =
            owner.query_one("select (now() + interval '15 minutes')::text", &[]).await?.get(0);
        for role in [APP, ISSUER] {
            // A utility statement takes no parameters.
            owner
                .batch_execute(&format!("alter role {role} password '{password}' valid until '{until}'"))
                .await?;
        }
        let mut config = superuser.clone();
        config.password(password);
        Ok(Self { config })
    }

    async fn connect(&self, role: &str) -> Result<Client> {
        connect(self.config.clone().user(role)).await
    }
}

struct Walk<'a> {
    report: &'a mut Report,
    superuser: Config,
    ordinary: Ordinary,
    owner: Client,
    issuer: Client,
    app: Client,
}

struct Tokens {
    ann: Token,
    ben: Token,
    office: Token,
}

/// An issued token, and how this walk has used it so far.
struct Token {
    id: Uuid,
    secret: String,
    hint: String,
    /// Its user and its hint.
    label: String,
    uses: i64,
    denials: i64,
}

impl Token {
    /// Every answer about a token is one use or one denial of it.
    fn count(&mut self, code: &str) {
        if code == "VALID" {
            self.uses += 1;
        } else {
            self.denials += 1;
        }
    }
}

impl Tokens {
    fn all(&self) -> [&Token; 3] {
        [&self.ann, &self.ben, &self.office]
    }
}

#[derive(Default)]
struct Request<'a> {
    required: Option<Vec<&'a str>>,
    client: Option<IpAddr>,
}

fn requiring<'a>(scopes: &[&'a str]) -> Request<'a> {
    Request { required: Some(scopes.to_vec()), client: None }
}

fn from(client: IpAddr) -> Request<'static> {
    Request { required: None, client: Some(client) }
}

/// The code; and the code with the user, if the row names one.
async fn answer(
    client: &impl GenericClient,
    secret: &str,
    request: &Request<'_>,
) -> Result<(String, String)> {
    answer_to(client, VERIFY, secret, request).await
}

/// The same, by a statement that takes and returns what [`VERIFY`] does.
async fn answer_to(
    client: &impl GenericClient,
    statement: &str,
    secret: &str,
    request: &Request<'_>,
) -> Result<(String, String)> {
    let row = client.query_one(statement, &[&secret, &request.required, &request.client]).await?;
    let (code, user): (String, Option<String>) = (row.try_get("code")?, row.try_get("user_id")?);
    let shown = user.map_or_else(|| code.clone(), |user| format!("{code}, {user}"));
    Ok((code, shown))
}

/// The outcome of a statement, from its SQLSTATE.
fn outcome<T>(result: &Result<T, tokio_postgres::Error>) -> String {
    match result {
        Ok(_) => "accepted".to_owned(),
        Err(error) => match error.code() {
            Some(state) => format!("refused, {}", state.code()),
            None => error.to_string(),
        },
    }
}

fn posts(ids: &[i64]) -> String {
    match ids {
        [] => "no posts".to_owned(),
        ids => format!("posts {}", ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")),
    }
}

async fn visible_posts(client: &impl GenericClient) -> Result<String> {
    let rows = client.query(POSTS, &[]).await?;
    Ok(posts(&rows.iter().map(|row| row.get(0)).collect::<Vec<i64>>()))
}

async fn current_user(client: &impl GenericClient) -> Result<String> {
    let user: Option<String> =
        client.query_one("select tollgate.current_user_id()", &[]).await?.try_get(0)?;
    Ok(user.unwrap_or_else(|| "no identity".to_owned()))
}

impl Walk<'_> {
    async fn application(&mut self) -> Result<()> {
        self.report.step(
            "An application: posts under row-level security, and ordinary roles",
            &["create policy read on posts for select using (\n    \
               (select tollgate.token_has_scope('demo:posts:read'))\n    \
               and (published or author = (select tollgate.current_user_id())))"],
        );
        let metering: bool = self.owner.query_one("select metering from tollgate.stats()", &[]).await?.get(0);
        self.report.check("the server's memory counts usage", "on", if metering { "on" } else { "off" });

        let deadline = Instant::now() + DAEMON_DEADLINE;
        let daemon = loop {
            let daemons = "select count(*) from tollgate.daemons where last_seen_at > clock_timestamp() - interval '60 s'";
            let seen: i64 = self.owner.query_one(daemons, &[]).await?.get(0);
            if seen > 0 || Instant::now() > deadline {
                break if seen > 0 { "seen" } else { "not seen" };
            }
            tokio::time::sleep(PAUSE).await;
        };
        self.report.check("a daemon serves this database", "seen", daemon);

        let special = "select count(*) from pg_roles where rolname = any($1) \
                       and (rolsuper or rolbypassrls or rolcreaterole or rolcreatedb or rolreplication)";
        let special: i64 = self.owner.query_one(special, &[&vec![APP, ISSUER]]).await?.get(0);
        self.report.check("its roles that have any special right", "0 of 2", format!("{special} of 2"));

        let reading = self.app.query("select token_hash from tollgate.api_tokens", &[]).await;
        self.report.check("the application reads the table of tokens", "refused, 42501", outcome(&reading));
        let issuing =
            self.app.query("select tollgate.create_api_token('demo:ann', 'mine', '{admin}')", &[]).await;
        self.report.check("the application issues itself a token", "refused, 42501", outcome(&issuing));
        self.report.check("it reads posts without a token", "no posts", visible_posts(&self.app).await?);
        Ok(())
    }

    async fn define_scopes(&mut self) -> Result<()> {
        self.report.step("Define scopes", &[DEFINE]);
        let catalogue = [
            (READ, "Read published posts, and one's own drafts"),
            (WRITE, "Write posts in one's own name"),
            (MODERATE, "Read every post"),
        ];
        for (name, description) in catalogue {
            self.owner.execute(DEFINE, &[&name, &description]).await?;
        }
        let defined = "select count(*) from tollgate.scopes where name = any($1)";
        let defined: i64 =
            self.owner.query_one(defined, &[&catalogue.map(|(name, _)| name).as_slice()]).await?.get(0);
        self.report.check(
            &format!("{READ}, …:write, …:moderate"),
            "3 in the catalogue",
            format!("{defined} in the catalogue"),
        );
        let wildcard = self.owner.execute(DEFINE, &[&"demo:posts:*", &"Everything"]).await;
        self.report.check("demo:posts:*, to be granted, not defined", "refused, 22023", outcome(&wildcard));
        let issuer = self.issuer.execute(DEFINE, &[&"demo:more", &"More"]).await;
        self.report.check("the issuer defines a scope", "refused, 42501", outcome(&issuer));
        Ok(())
    }

    async fn create(
        &self,
        user: &str,
        name: &str,
        scopes: &[&str],
        lifetime: Option<Duration>,
        networks: Option<&[&str]>,
    ) -> Result<Token, tokio_postgres::Error> {
        let seconds = lifetime.map(|time| time.as_secs_f64());
        let row = self.issuer.query_one(CREATE, &[&user, &name, &scopes, &seconds, &networks]).await?;
        let hint: String = row.get("hint");
        let label = format!("{}'s {hint}", if user == ANN { "Ann" } else { "Ben" });
        Ok(Token { id: row.get("id"), secret: row.get("token"), hint, label, uses: 0, denials: 0 })
    }

    /// The only place where a token is printed.
    fn show(&self, whose: &str, token: &Token) {
        self.report.note(format!("{whose}:"));
        self.report.note(format!("    {}", token.secret));
    }

    async fn issue(&mut self) -> Result<Tokens> {
        self.report.step("Issue tokens for two users", &[CREATE]);
        let tokens = Tokens {
            ann: self.create(ANN, "editor", &["demo:posts:*"], None, None).await?,
            ben: self.create(BEN, "laptop", &[READ], None, None).await?,
            office: self.create(BEN, "office", &[READ], None, Some(&[OFFICE])).await?,
        };
        for token in tokens.all() {
            let parsed = token::parse(token.secret.as_bytes());
            let came = parsed.map_or_else(|| "malformed".to_owned(), |parsed| parsed.hint());
            self.report.check(&format!("{}: checksum, checked offline", token.label), &token.hint, came);
        }
        let digests: Vec<Vec<u8>> =
            tokens.all().iter().map(|token| token::digest(token.secret.as_bytes()).to_vec()).collect();
        let stored = "select count(*) from tollgate.api_tokens where token_hash = any($1)";
        let stored: i64 = self.owner.query_one(stored, &[&digests]).await?.get(0);
        self.report.check("rows that hold the SHA-256 of one of them", 3, stored);

        let bodies: Vec<&str> =
            tokens.all().iter().filter_map(|token| token.secret.rsplit('_').next()).collect();
        let plaintext = "select count(*) from unnest($1::text[]) as secret, (\
                             select t::text from tollgate.api_tokens t union all select a::text from tollgate.audit_log a) as r (line) \
                         where position(secret in line) > 0";
        let plaintext: i64 = self.owner.query_one(plaintext, &[&bodies]).await?.get(0);
        self.report.check("rows of tokens and audit log with a plaintext", 0, plaintext);

        let undefined = self.create(BEN, "typo", &["demo:posts:raed"], None, None).await;
        self.report.check("a token with an undefined scope (a typo)", "refused, 22023", outcome(&undefined));

        self.report.note("Shown once, as create_api_token returned them; from here on by their hints.");
        self.show(&format!("{ANN}, scope demo:posts:*"), &tokens.ann);
        self.show(&format!("{BEN}, scope {READ}"), &tokens.ben);
        self.show(&format!("{BEN}, scope {READ}, only from {OFFICE}"), &tokens.office);
        Ok(tokens)
    }

    async fn verify(&mut self, tokens: &mut Tokens) -> Result<()> {
        self.report.step("Verify: one row, always, which names a user only if the token is valid; nothing is raised or written", &[VERIFY]);
        let (ann, ben, office) = (&mut tokens.ann, &mut tokens.ben, &mut tokens.office);
        self.verification(ann, "", Request::default(), "VALID, demo:ann").await?;
        self.verification(ben, "", Request::default(), "VALID, demo:ben").await?;
        self.verification(ann, &format!("needs {MODERATE}"), requiring(&[MODERATE]), "VALID, demo:ann")
            .await?;
        self.verification(ben, &format!("needs {WRITE}"), requiring(&[READ, WRITE]), "INSUFFICIENT_SCOPE")
            .await?;
        self.verification(office, &format!("from {CLIENT}"), from(CLIENT), "VALID, demo:ben").await?;
        self.verification(office, &format!("from {STRANGER}"), from(STRANGER), "IP_NOT_ALLOWED").await?;

        let mut typo = tokens.ann.secret.clone();
        let last = if typo.pop() == Some('0') { '1' } else { '0' };
        typo.push(last);
        let (_, came) = answer(&self.app, &typo, &Request::default()).await?;
        let done = format!("{}, its last character changed", tokens.ann.label);
        self.report.check(&done, "MALFORMED", came);
        let stranger = token::issue(&Prefix::default(), &[0xa5; ENTROPY_LEN]);
        let (_, came) = answer(&self.app, stranger.token(), &Request::default()).await?;
        self.report.check("a well-formed token that was never issued", "NOT_FOUND", came);

        let transaction = self
            .app
            .build_transaction()
            .read_only(true)
            .isolation_level(IsolationLevel::RepeatableRead)
            .start()
            .await?;
        let (code, came) = answer(&transaction, &tokens.ann.secret, &Request::default()).await?;
        tokens.ann.count(&code);
        let id: Option<String> =
            transaction.query_one("select pg_current_xact_id_if_assigned()::text", &[]).await?.get(0);
        transaction.commit().await?;
        self.report.check(
            &format!("{} in a READ ONLY transaction", tokens.ann.label),
            "VALID, demo:ann",
            came,
        );
        self.report.check("the transaction id that this took", "none", id.as_deref().unwrap_or("none"));
        Ok(())
    }

    async fn verification(
        &mut self,
        token: &mut Token,
        how: &str,
        request: Request<'_>,
        expected: &str,
    ) -> Result<()> {
        let (code, came) = answer(&self.app, &token.secret, &request).await?;
        token.count(&code);
        self.report.check(format!("{} {how}", token.label).trim_end(), expected, came);
        Ok(())
    }

    async fn read_posts(&mut self, tokens: &mut Tokens) -> Result<()> {
        self.report.step(
            "Authenticate, and read posts under row-level security: each sees what their scopes allow",
            &["begin", AUTHENTICATE, POSTS, WRITE_POST, "commit"],
        );
        for (token, user, expected) in
            [(&mut tokens.ann, ANN, [1, 2, 3, 4].as_slice()), (&mut tokens.ben, BEN, &[1, 3, 4])]
        {
            let transaction = self.app.transaction().await?;
            transaction.query_one(AUTHENTICATE, &[&token.secret]).await?;
            token.count("VALID");
            let came = (current_user(&transaction).await?, visible_posts(&transaction).await?);
            transaction.commit().await?;
            self.report.check(&format!("{}: who it is", token.label), user, came.0);
            self.report.check(&format!("{}: the posts it sees", token.label), posts(expected), came.1);
        }
        self.report.check(
            "the same connection after the commit",
            "no identity, no posts",
            format!("{}, {}", current_user(&self.app).await?, visible_posts(&self.app).await?),
        );

        let posted = self.post_as(&mut tokens.ben, BEN).await?;
        self.report.check(
            &format!("{} writes, without that scope", tokens.ben.label),
            "refused, 42501",
            posted,
        );
        let posted = self.post_as(&mut tokens.ann, BEN).await?;
        self.report.check(&format!("{} writes in Ben's name", tokens.ann.label), "refused, 42501", posted);
        let posted = self.post_as(&mut tokens.ann, ANN).await?;
        self.report.check(&format!("{} writes in her own", tokens.ann.label), "accepted", posted);
        Ok(())
    }

    async fn post_as(&mut self, token: &mut Token, author: &str) -> Result<String> {
        let transaction = self.app.transaction().await?;
        transaction.query_one(AUTHENTICATE, &[&token.secret]).await?;
        token.count("VALID");
        let result = transaction.execute(WRITE_POST, &[&author, &"A post of the walk"]).await;
        let came = outcome(&result);
        if result.is_ok() {
            transaction.commit().await?;
        } else {
            transaction.rollback().await?;
        }
        Ok(came)
    }

    async fn forge(&mut self, tokens: &mut Tokens) -> Result<()> {
        self.report.step(
            "Forge an identity: with the very value that authenticate() set for Ann",
            &["set tollgate.context = '…'", FORGE],
        );
        let transaction = self.app.transaction().await?;
        transaction.query_one(AUTHENTICATE, &[&tokens.ann.secret]).await?;
        tokens.ann.count("VALID");
        let row = transaction.query_one("select current_setting('tollgate.context')", &[]).await?;
        let stolen: String = row.get(0);
        transaction.rollback().await?;
        ensure!(
            stolen.contains(ANN),
            "the setting that carries the identity was not found, so nothing could be forged"
        );

        let mut app = self.ordinary.connect(APP).await?;
        let superuser = connect(&self.superuser).await?;
        let escaped = stolen.replace('\'', "''");
        let set = format!("set tollgate.context = '{escaped}'");
        // PostgreSQL refuses this setting to other roles because only superusers may change it (42501), and to a
        // superuser because of its value (22023).
        for (who, client, expected) in [
            ("the application's role", &app, "refused, 42501, no identity"),
            ("a superuser", &superuser, "refused, 22023, no identity"),
        ] {
            let came = outcome(&client.batch_execute(&set).await);
            let came = format!("{came}, {}", current_user(client).await?);
            self.report.check(&format!("{who}: SET"), expected, came);
            let came = outcome(&client.query_one(FORGE, &[&stolen, &false]).await);
            let came = format!("{came}, {}", current_user(client).await?);
            self.report.check(&format!("{who}: set_config"), expected, came);
        }
        let always = format!("alter role {APP} set tollgate.context = '{escaped}'");
        let came = outcome(&superuser.batch_execute(&always).await);
        self.report.check("a superuser: ALTER ROLE … SET", "refused, 22023", came);

        let mut transaction = app.transaction().await?;
        transaction.query_one(AUTHENTICATE, &[&tokens.ben.secret]).await?;
        tokens.ben.count("VALID");
        let savepoint = transaction.transaction().await?;
        let came = outcome(&savepoint.query_one(FORGE, &[&stolen, &true]).await);
        savepoint.rollback().await?;
        let came = format!("{came}, {}", current_user(&transaction).await?);
        transaction.rollback().await?;
        self.report.check("Ben, authenticated, makes himself Ann", "refused, 42501, demo:ben", came);
        Ok(())
    }

    async fn count_usage(&mut self, tokens: &mut Tokens) -> Result<()> {
        self.report.step(
            "Usage: counted in shared memory, flushed to the tables by the daemon, exact",
            &[VERIFY, "select * from tollgate.tokens where id = any($1)"],
        );
        let began = Instant::now();
        let mut connections = JoinSet::new();
        for _ in 0..CONNECTIONS {
            let client = self.ordinary.connect(APP).await?;
            connections.spawn(load(client, tokens.ann.secret.clone(), tokens.ben.secret.clone()));
        }
        for (ann, ben) in connections.join_all().await.into_iter().collect::<Result<Vec<_>>>()? {
            tokens.ann.uses += ann.0;
            tokens.ann.denials += ann.1;
            tokens.ben.uses += ben.0;
            tokens.ben.denials += ben.1;
        }
        let ended = Instant::now();
        self.report.aside(format!(
            "{} verifications by {CONNECTIONS} connections took {}; now the daemon flushes, every 5 s …",
            CONNECTIONS * CALLS,
            seconds(ended - began)
        ));

        let ids: Vec<Uuid> = tokens.all().iter().map(|token| token.id).collect();
        let expected: i64 = tokens.all().iter().map(|token| token.uses + token.denials).sum();
        let usage =
            "select id, use_count, denied_count, host(last_used_ip) from tollgate.tokens where id = any($1)";
        let rows = loop {
            let rows = self.owner.query(usage, &[&ids]).await?;
            let counted: i64 = rows.iter().map(|row| row.get::<_, i64>(1) + row.get::<_, i64>(2)).sum();
            if counted >= expected {
                self.report.aside(format!("… and did, {} after the last of them.", seconds(ended.elapsed())));
                break rows;
            }
            if ended.elapsed() > DAEMON_DEADLINE {
                self.report.aside(format!("… which it did not within {}.", seconds(DAEMON_DEADLINE)));
                break rows;
            }
            tokio::time::sleep(PAUSE).await;
        };
        for token in tokens.all() {
            let row = rows
                .iter()
                .find(|row| row.get::<_, Uuid>(0) == token.id)
                .context("an issued token is listed")?;
            let came = format!("{} used, {} denied", row.get::<_, i64>(1), row.get::<_, i64>(2));
            let expected = format!("{} used, {} denied", token.uses, token.denials);
            self.report.check(&format!("{} since it was issued", token.label), expected, came);
            let ip: Option<String> = row.get(3);
            let came = ip.unwrap_or_else(|| "nowhere".to_owned());
            self.report.check(&format!("{} was last used from", token.label), CLIENT, came);
        }
        Ok(())
    }

    async fn last_event(&self) -> Result<i64> {
        let last = "select coalesce(max(id), 0) from tollgate.audit_log";
        Ok(self.owner.query_one(last, &[]).await?.try_get(0)?)
    }

    async fn revoke(&mut self, tokens: &Tokens, tail: &mut Tail) -> Result<()> {
        self.report.step(
            "Revoke: at once, and published to all subscribers",
            &[REVOKE, "$ tollgated tail --follow"],
        );
        let ben = &tokens.ben;
        let mut other = self.ordinary.connect(APP).await?;
        let older = other.build_transaction().isolation_level(IsolationLevel::RepeatableRead).start().await?;
        let (_, before) = answer(&older, &ben.secret, &Request::default()).await?;
        self.report.check(
            &format!("{} in a REPEATABLE READ transaction", ben.label),
            "VALID, demo:ben",
            before,
        );

        let reason = "laptop lost";
        let wrong_user: bool = self.issuer.query_one(REVOKE, &[&ben.id, &ANN, &reason]).await?.get(0);
        self.report.check("the issuer revokes it, as a token of Ann's", false, wrong_user);
        let revoked: bool = self.issuer.query_one(REVOKE, &[&ben.id, &BEN, &reason]).await?.get(0);
        self.report.check("the issuer revokes it, as a token of Ben's", true, revoked);

        let (_, after) = answer(&older, &ben.secret, &Request::default()).await?;
        older.rollback().await?;
        self.report.check("that transaction, which began before, again", "REVOKED", after);
        let refused = self.app.query_one(AUTHENTICATE, &[&ben.secret]).await;
        self.report.check("the application authenticates with it", "refused, 28000", outcome(&refused));

        let (event, line) = tail.event("token.revoked", ben.id, EVENT_DEADLINE).await?;
        let field = |name: &str| event[name].as_str().unwrap_or("missing").to_owned();
        self.report.check("the event at tollgated tail: who did it", ISSUER, field("actor"));
        self.report.check("why", reason, field("reason"));
        self.report.check("whose token it was", BEN, field("user_id"));
        self.report.aside(line);
        Ok(())
    }

    async fn expire(&mut self, tail: &mut Tail) -> Result<()> {
        self.report
            .step("Expire: refused from that moment on, and recorded by the daemon", &[CREATE, VERIFY]);
        let token = self
            .create(ANN, "for a moment", &[READ], Some(LIFETIME), None)
            .await
            .context("cannot issue a token that expires")?;
        let began = Instant::now();
        let (_, came) = answer(&self.app, &token.secret, &Request::default()).await?;
        self.report.check(
            &format!("{} issued for {}", token.label, seconds(LIFETIME)),
            "VALID, demo:ann",
            came,
        );
        let came = loop {
            let (code, came) = answer(&self.app, &token.secret, &Request::default()).await?;
            if code != "VALID" || began.elapsed() > LIFETIME + EVENT_DEADLINE {
                break came;
            }
            tokio::time::sleep(PAUSE).await;
        };
        self.report.check(&format!("{} after {}", token.label, seconds(began.elapsed())), "EXPIRED", came);

        self.report.aside("Now the daemon records it, every 5 s …");
        let (event, line) = tail.event("token.expired", token.id, DAEMON_DEADLINE).await?;
        let user = event["user_id"].as_str().unwrap_or("missing").to_owned();
        self.report.check("the event at tollgated tail: whose token it was", ANN, user);
        self.report.aside(line);
        let recorded =
            "select count(*) from tollgate.audit_log where event = 'token.expired' and token_id = $1";
        let recorded: i64 = self.owner.query_one(recorded, &[&token.id]).await?.get(0);
        self.report.check("times it was recorded", 1, recorded);
        Ok(())
    }

    fn status(&mut self) -> Result<()> {
        self.report.step("The state of it all", &["$ tollgated status"]);
        let output = tollgated().arg("status").output().context(NO_TOLLGATED)?;
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            self.report.note(line);
        }
        for line in String::from_utf8_lossy(&output.stderr).lines() {
            self.report.note(line);
        }
        self.report.check("tollgated status: 0 says that a daemon lives", "exit status: 0", output.status);
        Ok(())
    }
}

/// The statements of one connection of the load, and the uses and denials they cause, of Ann's token and of Ben's.
async fn load(client: Client, ann: String, ben: String) -> Result<((i64, i64), (i64, i64))> {
    let verify = client.prepare(VERIFY).await?;
    let mut counts = [(0, 0), (0, 0)];
    for call in 0..CALLS {
        let whose = usize::try_from(call % 2)?;
        let refused = call % REFUSED_EVERY == 0;
        let required = if refused { vec![READ, "demo:users:read"] } else { vec![READ] };
        let secret = [&ann, &ben][whose];
        let row = client.query_one(&verify, &[secret, &Some(required), &Some(CLIENT)]).await?;
        let code: &str = row.try_get("code")?;
        match code {
            "VALID" => counts[whose].0 += 1,
            "INSUFFICIENT_SCOPE" => counts[whose].1 += 1,
            other => anyhow::bail!("a verification of the load came back as {other}"),
        }
    }
    Ok((counts[0], counts[1]))
}

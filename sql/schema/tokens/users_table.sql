-- The application's users tables: tokens are issued for existing users, and end with them, like rows with a foreign
-- key. The arguments of an attachment are stored in the arguments of its triggers, and nowhere else.

CREATE FUNCTION tollgate.attach_users_table(
    "table"      regclass,
    key_column   name,
    require_user boolean DEFAULT NULL,
    active       text    DEFAULT NULL,
    on_inactive  text    DEFAULT NULL
) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    key_number smallint;
    attached   text[];
    present    text;
    wanted     text[];
    condition  smallint[] := '{}';
    branch     regclass;
BEGIN
    IF length(tollgate.without_token('active', $4)) > 1000 OR $4 !~ '[^[:space:]]' THEN
        RAISE EXCEPTION 'a condition has 1 to 1000 characters'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: active, of %s characters.', length($4)),
                  HINT = 'Such as ''deleted_at IS NULL''.';
    ELSIF $5 NOT IN ('refuse', 'revoke') THEN
        RAISE EXCEPTION 'the tokens of an inactive user are refused or revoked'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: on_inactive, of %s.', tollgate.quote_redacted($5)),
                  HINT = 'Pass ''refuse'' or ''revoke''.';
    END IF;
    PERFORM tollgate.check_users_table($1);
    -- Waits for transactions that are changing users, and keeps other attachments out.
    EXECUTE format('LOCK TABLE %s IN SHARE ROW EXCLUSIVE MODE', $1);
    -- And waits for transactions that issue tokens, so that this one and later ones see all of them, and for those that have
    -- locked some and are about to change them. A lock that let these in would wait for one of their rows, and they for it.
    LOCK TABLE tollgate.api_tokens, tollgate.sessions IN EXCLUSIVE MODE;

    SELECT a.attnum INTO key_number FROM pg_attribute a WHERE a.attrelid = $1 AND a.attname = $2 AND a.attnum > 0 AND NOT a.attisdropped;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'table % has no such column', $1
            USING ERRCODE = 'undefined_column', DETAIL = format('Argument: key_column, of %s.', tollgate.quote_redacted($2)),
                  HINT = 'Name the column whose text is the user_id of tokens.';
    END IF;
    PERFORM tollgate.check_users_key($1, key_number);
    attached := tollgate.users_table_arguments($1);
    BEGIN
        present := (tollgate.users_key($1, attached))[1];
    EXCEPTION WHEN undefined_column OR datatype_mismatch OR wrong_object_type THEN
        -- It can no longer be the key: the given column replaces it.
        NULL;
    END;
    IF present <> quote_ident($2) THEN
        RAISE EXCEPTION 'table % is attached by another column', $1
            USING ERRCODE = 'duplicate_object', DETAIL = format('Argument: key_column, of %I; it is attached by %s.', $2, present),
                  HINT = 'Detach it with tollgate.detach_users_table() first.';
    END IF;

    -- A timestamp of this name usually has one meaning; where it has another, tokens are refused rather than accepted.
    IF attached IS NULL AND $4 IS NULL
       AND EXISTS (SELECT FROM pg_attribute a
                   WHERE a.attrelid = $1 AND a.attname = 'deleted_at' AND NOT a.attisdropped AND a.attgenerated = ''
                     AND a.atttypid = ANY ('{timestamptz,timestamp}'::regtype[])) THEN
        $4 := 'deleted_at IS NULL';
        RAISE NOTICE 'users whose deleted_at is set in table % count as inactive', $1
            USING DETAIL = 'Their tokens are refused until it is NULL again.',
                  HINT = 'If that is not what the column means, attach the table again with active => ''true''.';
    END IF;
    -- Arguments that are left out keep their values: attaching again for a new partition loosens nothing.
    $3 := coalesce($3, attached[2]::boolean, true);
    $4 := coalesce($4, nullif(attached[4], ''));
    $5 := coalesce($5, nullif(attached[3], ''), CASE WHEN $4 IS NOT NULL THEN 'refuse' END);
    IF $5 IS NOT NULL AND $4 IS NULL THEN
        RAISE EXCEPTION 'there is no condition under which a user is active'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: active, which is NULL.',
                  HINT = 'Pass one together with on_inactive, such as ''deleted_at IS NULL''.';
    END IF;
    IF $4 IS NOT NULL THEN
        condition := tollgate.check_users_condition($1, $4);
    END IF;
    wanted := ARRAY[$2, $3::text, coalesce($5, ''), coalesce($4, ''),
                    concat_ws(' ', tollgate.system_identifier(), $1::oid, key_number, nullif(array_to_string(condition, ' '), ''))];

    IF attached <> wanted THEN
        PERFORM tollgate.drop_users_triggers($1);
    END IF;
    -- A partition may be written to directly, which the partitioned table's statement triggers do not see.
    IF (SELECT c.relkind = 'p' FROM pg_class c WHERE c.oid = $1) THEN
        PERFORM tollgate.attach_trigger($1, 'tollgate_user_deleted', 'AFTER DELETE', 'FOR EACH ROW', 'users_row_changed', wanted, 'ALWAYS');
    ELSE
        PERFORM tollgate.attach_trigger($1, 'tollgate_user_deleted', 'AFTER DELETE',
                                        'REFERENCING OLD TABLE AS departed FOR EACH STATEMENT', 'revoke_departed_users', wanted, '');
        -- A subscription applies rows, and fires no trigger of a statement but that of TRUNCATE.
        PERFORM tollgate.attach_trigger($1, 'tollgate_user_deletion_applied', 'AFTER DELETE', 'FOR EACH ROW', 'users_row_changed', wanted, 'REPLICA');
    END IF;
    PERFORM tollgate.attach_trigger($1, 'tollgate_user_changed', CASE WHEN $4 IS NULL THEN 'AFTER UPDATE' ELSE 'AFTER INSERT OR UPDATE' END,
                                    'FOR EACH ROW', 'users_row_changed', wanted, 'ALWAYS');
    FOR branch IN SELECT $1 UNION SELECT p.relid FROM pg_partition_tree($1) p LOOP
        PERFORM tollgate.attach_trigger(branch, 'tollgate_users_truncated', 'BEFORE TRUNCATE', 'FOR EACH STATEMENT', 'revoke_departed_users', wanted, 'ALWAYS');
    END LOOP;

    IF $4 IS NOT NULL THEN
        PERFORM tollgate.settle_all_users($1, wanted);
    END IF;
    PERFORM tollgate.advise_on_users_table($1, key_number, $4);
END
$$;
COMMENT ON FUNCTION tollgate.attach_users_table(regclass, name, boolean, text, text) IS
    'Makes tokens end with their users: those who are deleted from a table, truncated away or given another key. Only its owner may call it; the key''s text is the user_id. With require_user, the default, tokens are issued only for users in the table (23503); active is a condition, evaluated as the owner: the tokens of users for whom it is not true are refused until it is, or revoked, as on_inactive says. A repeated call adds what is missing, for example for new partitions, and changes the given arguments';

CREATE FUNCTION tollgate.detach_users_table("table" regclass) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM tollgate.check_users_table($1);
    EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE', $1);
    RETURN tollgate.drop_users_triggers($1);
END
$$;
COMMENT ON FUNCTION tollgate.detach_users_table(regclass) IS
    'Removes the triggers of attach_users_table from a table; false when there are none. Only its owner may call it. Tokens do not change: one that is disabled with its user can then be enabled';

-- ---- Attaching

CREATE FUNCTION tollgate.check_users_table(users regclass) RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    kind      "char";
    owner     oid;
    is_branch boolean;
BEGIN
    SELECT c.relkind, c.relowner, c.relispartition INTO kind, owner, is_branch FROM pg_class c WHERE c.oid = $1;
    IF kind IS NULL OR kind NOT IN ('r', 'p') OR is_branch THEN
        RAISE EXCEPTION 'users are kept in an ordinary or a partitioned table'
            USING ERRCODE = 'wrong_object_type', DETAIL = format('Argument: table, of %s.', coalesce($1::text, 'NULL')),
                  HINT = 'Attach the table that views show, or the whole of a partitioned table.';
    END IF;
    IF NOT pg_has_role(tollgate.acting_role(), owner, 'USAGE') THEN
        RAISE EXCEPTION 'must be owner of table %', $1
            USING ERRCODE = 'insufficient_privilege', DETAIL = 'Argument: table.',
                  HINT = 'Attaching a table puts triggers on it: let its owner do that.';
    END IF;
    -- A statement on one of them removes rows of the other without firing its triggers. So do foreign servers.
    IF EXISTS (SELECT FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
               WHERE NOT c.relispartition AND (i.inhrelid = $1 OR i.inhparent = $1)) THEN
        RAISE EXCEPTION 'table % shares rows with another by inheritance', $1
            USING ERRCODE = 'wrong_object_type', DETAIL = 'Argument: table.',
                  HINT = 'Keep users in a table without inheritance; partitions are fine.';
    END IF;
    IF EXISTS (SELECT FROM pg_partition_tree($1) p JOIN pg_class c ON c.oid = p.relid WHERE c.relkind = 'f') THEN
        RAISE EXCEPTION 'a partition of table % is on another server', $1
            USING ERRCODE = 'wrong_object_type', DETAIL = 'Argument: table.',
                  HINT = 'Rows may be deleted there without a trigger here. Revoke the tokens of their users with tollgate.revoke_all_api_tokens(user_id).';
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.check_users_table(regclass) IS 'Raises 42809 or 42501 unless the caller may attach a table. Internal.';

CREATE FUNCTION tollgate.check_users_key(users oid, key_number smallint) RETURNS void
    LANGUAGE c STABLE
    AS 'MODULE_PATHNAME', 'check_users_key';
COMMENT ON FUNCTION tollgate.check_users_key(oid, smallint) IS 'Raises 42804 or 42809 unless a column can be the key of a users table. Internal.';

CREATE FUNCTION tollgate.check_users_condition(users oid, condition text) RETURNS smallint[]
    LANGUAGE c STABLE
    AS 'MODULE_PATHNAME', 'check_users_condition';
COMMENT ON FUNCTION tollgate.check_users_condition(oid, text) IS
    'The numbers of the columns that a condition reads, 0 for all of them; raises unless it is an immutable expression over one row. Analysed as the table''s owner. Internal.';

CREATE FUNCTION tollgate.users_key(users oid, arguments text[]) RETURNS text[]
    LANGUAGE c STABLE STRICT
    AS 'MODULE_PATHNAME', 'users_key';
COMMENT ON FUNCTION tollgate.users_key(oid, text[]) IS
    'The quoted key column of an attached table, or of a partition of it, also if it was renamed, and the condition that compares keys u.k with user ids d; raises if it can no longer be a key. Internal.';

CREATE FUNCTION tollgate.users_table_arguments(users oid) RETURNS text[]
    LANGUAGE c STABLE STRICT
    AS 'MODULE_PATHNAME', 'users_table_arguments';
COMMENT ON FUNCTION tollgate.users_table_arguments(oid) IS
    'The arguments of the triggers of an attached table: key column, require_user, on_inactive, active, and the cluster, table and columns by number; NULL if it is not attached. Internal.';

CREATE FUNCTION tollgate.attached_users_tables() RETURNS TABLE (users regclass, arguments text[])
    LANGUAGE sql STABLE ROWS 1
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT t.tgrelid::regclass, tollgate.users_table_arguments(t.tgrelid)
    FROM pg_depend d JOIN pg_trigger t ON t.oid = d.objid
    WHERE d.refclassid = 'pg_proc'::regclass AND d.classid = 'pg_trigger'::regclass
      AND d.refobjid = (SELECT p.oid FROM pg_proc p WHERE p.pronamespace = 'tollgate'::regnamespace AND p.proname = 'users_row_changed')
      AND t.tgname = 'tollgate_user_changed' AND t.tgparentid = 0
      AND NOT EXISTS (SELECT FROM pg_class c WHERE c.oid = t.tgrelid AND pg_is_other_temp_schema(c.relnamespace));
END;
COMMENT ON FUNCTION tollgate.attached_users_tables() IS 'The attached tables and the arguments of their triggers. Internal.';

CREATE FUNCTION tollgate.list_users_tables()
    RETURNS TABLE ("table" regclass, key_column text, require_user boolean, active text, on_inactive text)
    LANGUAGE sql STABLE SECURITY DEFINER ROWS 1
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT a.users, (tollgate.users_key(a.users, a.arguments))[1], a.arguments[2]::boolean, nullif(a.arguments[4], ''), nullif(a.arguments[3], '')
    FROM tollgate.attached_users_tables() a ORDER BY a.users::text;
END;
COMMENT ON FUNCTION tollgate.list_users_tables() IS 'The attached users tables, with their current key columns';

CREATE FUNCTION tollgate.attach_trigger(
    users         regclass,
    trigger_name  name,
    event         text,
    firing        text,
    function_name name,
    arguments     text[],
    enabled       text
) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = $1 AND t.tgname = $2) THEN
        EXECUTE format('CREATE TRIGGER %I %s ON %s %s EXECUTE FUNCTION tollgate.%I(%s)', $2, $3, $1, $4, $5,
                       (SELECT string_agg(quote_literal(a), ', ' ORDER BY n) FROM unnest($6) WITH ORDINALITY u (a, n)));
        -- DROP EXTENSION drops it, and leaves the table alone.
        EXECUTE format('ALTER TRIGGER %I ON %s DEPENDS ON EXTENSION tollgate', $2, $1);
    END IF;
    -- Also of an existing one: pg_restore --disable-triggers leaves all of a table as ordinary ones.
    EXECUTE format('ALTER TABLE %s ENABLE %s TRIGGER %I', $1, $7, $2);
END
$$;
COMMENT ON FUNCTION tollgate.attach_trigger(regclass, name, text, text, name, text[], text) IS
    'Creates a trigger of attach_users_table on a table, unless it exists, and enables it: always, for the replica role, or for all others. Internal.';

CREATE FUNCTION tollgate.drop_users_triggers(users regclass) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    trigger record;
    found   boolean := false;
BEGIN
    FOR trigger IN
        SELECT t.tgname AS name, t.tgrelid::regclass AS of FROM pg_trigger t
        WHERE t.tgrelid IN (SELECT $1 UNION SELECT p.relid FROM pg_partition_tree($1) p) AND t.tgparentid = 0
          AND t.tgname IN ('tollgate_user_deleted', 'tollgate_user_deletion_applied', 'tollgate_user_changed', 'tollgate_users_truncated')
          AND t.tgfoid IN (SELECT p.oid FROM pg_proc p WHERE p.pronamespace = 'tollgate'::regnamespace)
    LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', trigger.name, trigger.of);
        found := true;
    END LOOP;
    RETURN found;
END
$$;
COMMENT ON FUNCTION tollgate.drop_users_triggers(regclass) IS 'Drops the triggers of attach_users_table, and returns whether there were any. Internal.';

CREATE FUNCTION tollgate.advise_on_users_table(users regclass, key_number smallint, active text) RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    switch record;
BEGIN
    IF NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = $1 AND i.indkey[0] = $2 AND i.indisvalid AND i.indpred IS NULL) THEN
        RAISE NOTICE 'no index of table % begins with its key column', $1
            USING DETAIL = 'Each issued token, and each deleted user, reads the whole table.', HINT = 'Create one, preferably unique.';
    END IF;
    SELECT quote_ident(a.attname) AS name,
           CASE WHEN a.atttypid <> 'boolean'::regtype THEN quote_ident(a.attname) || ' IS NULL'
                WHEN a.attname ~ '(active|enabled)' THEN quote_ident(a.attname)
                ELSE 'NOT ' || quote_ident(a.attname) END AS condition
        INTO switch
        FROM pg_attribute a
        WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped AND a.attname ~ '^(is_)?(deleted|disabled|deactivated|banned|blocked|suspended|archived|locked|active|enabled)(_at|_on)?$'
          AND CASE WHEN a.attname ~ '_(at|on)$' THEN a.atttypid = ANY ('{timestamptz,timestamp,date}'::regtype[])
                   ELSE a.atttypid = 'boolean'::regtype AND a.attname !~ '(active|enabled).*_' END
        ORDER BY a.attnum LIMIT 1;
    IF FOUND AND $3 IS NULL THEN
        RAISE NOTICE 'users who are deactivated in table % keep their tokens', $1
            USING DETAIL = format('Its column %s looks as if it deactivated users.', switch.name),
                  HINT = format('Attach it again with active => %L.', switch.condition);
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.advise_on_users_table(regclass, smallint, text) IS
    'Notices for the caller that attaches a table without an index, or with a column that seems to deactivate users but no condition. Internal.';

CREATE FUNCTION tollgate.users_table_faults() RETURNS TABLE (severity text, detail text, remedy text)
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    users     regclass;
    arguments text[];
    key       text;
    again     text;
BEGIN
    FOR users IN
        SELECT DISTINCT coalesce(pg_partition_root(t.tgrelid), t.tgrelid)::regclass FROM pg_trigger t
        WHERE t.tgfoid IN (SELECT p.oid FROM pg_proc p
                           WHERE p.pronamespace = 'tollgate'::regnamespace AND p.proname IN ('users_row_changed', 'revoke_departed_users'))
          AND NOT EXISTS (SELECT FROM pg_class c WHERE c.oid = t.tgrelid AND pg_is_other_temp_schema(c.relnamespace))
        ORDER BY 1
    LOOP
        arguments := tollgate.users_table_arguments(users);
        key := arguments[1];
        -- In the same way as its triggers and issuing.
        BEGIN
            key := (parse_ident((tollgate.users_key(users, arguments))[1]))[1];
            IF arguments[4] <> '' THEN
                PERFORM tollgate.check_users_condition(users, arguments[4]);
            END IF;
        EXCEPTION
            WHEN syntax_error_or_access_rule_violation OR data_exception OR feature_not_supported THEN
                severity := 'fail';
                detail := format('the users table %s has changed since it was attached, so that changes of it and issuing for its users fail: %s',
                                 users, tollgate.quote_redacted(SQLERRM));
                remedy := format('SELECT tollgate.attach_users_table(%L, %L), with the column that is the key now, and the condition as active', users, key);
                RETURN NEXT;
        END;
        again := format('SELECT tollgate.attach_users_table(%L, %L);', users, key);
        RETURN QUERY SELECT 'fail',
                format('the users table %s lacks the trigger %s%s: tokens of removed users may stay valid', users, w.name,
                       CASE WHEN w.of = users THEN '' ELSE format(' of its partition %s', w.of) END), again
            FROM (SELECT users AS of, n AS name FROM unnest('{tollgate_user_deleted,tollgate_user_changed,tollgate_users_truncated}'::text[]) n
                  UNION ALL
                  SELECT users, 'tollgate_user_deletion_applied' FROM pg_class c WHERE c.oid = users AND c.relkind = 'r'
                  UNION ALL
                  -- A partition that is attached later gets the row triggers, and not this one.
                  SELECT p.relid, 'tollgate_users_truncated' FROM pg_partition_tree(users) p WHERE p.relid <> users) w
            WHERE NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = w.of AND t.tgname = w.name)
            ORDER BY w.of <> users, w.of, w.name;
        RETURN QUERY SELECT CASE WHEN t.tgenabled = 'O' THEN 'warn' ELSE 'fail' END,
                format('the trigger %I of %s is disabled%s: tokens of removed users stay valid', t.tgname, t.tgrelid::regclass,
                       CASE WHEN t.tgenabled = 'O' THEN ' for changes that a subscription applies, and for session_replication_role = replica' ELSE '' END),
                again || ' and revoke the tokens of users who were removed meanwhile'
            FROM pg_trigger t
            WHERE t.tgrelid IN (SELECT users UNION SELECT p.relid FROM pg_partition_tree(users) p)
              AND CASE WHEN t.tgname = 'tollgate_user_deletion_applied' THEN t.tgenabled IN ('D', 'O')
                       WHEN t.tgname = 'tollgate_user_deleted' AND t.tgoldtable IS NOT NULL THEN t.tgenabled IN ('D', 'R')
                       WHEN t.tgname IN ('tollgate_user_deleted', 'tollgate_user_changed', 'tollgate_users_truncated') THEN t.tgenabled <> 'A' END
            ORDER BY t.tgrelid, t.tgname;
    END LOOP;
END
$$;
COMMENT ON FUNCTION tollgate.users_table_faults() IS 'Problems that keep attached tables from ending the tokens of their users. Internal.';

-- ---- Effects on the tokens of users

CREATE FUNCTION tollgate.query_as(role oid, query text, keys text[]) RETURNS text[]
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'query_as';
COMMENT ON FUNCTION tollgate.query_as(oid, text, text[]) IS
    'The result of a query of the keys ($1) that runs with the rights of a role. Internal.';

-- Reads the table at most once for all keys.
CREATE FUNCTION tollgate.states_of_users(users regclass, arguments text[], user_ids text[]) RETURNS text[]
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    key    text[] := tollgate.users_key($1, $2);
    states text[];
BEGIN
    SELECT tollgate.query_as(c.relowner, format(
            'SELECT array_agg(s.state || s.d) FROM (
                 SELECT d, CASE WHEN count(u.k) = 0 THEN ''d'' WHEN bool_or(u.a) THEN ''a'' ELSE ''i'' END AS state
                 FROM unnest($1) d LEFT JOIN (SELECT %s AS k, coalesce((%s' || chr(10) || '), false) AS a FROM %s %s) u ON %s
                 GROUP BY d) s',
            key[1], coalesce(nullif($2[4], ''), 'true'), CASE c.relkind WHEN 'p' THEN '' ELSE 'ONLY' END, $1, key[2]), $3)
        INTO states FROM pg_class c WHERE c.oid = $1;
    RETURN coalesce(states, '{}');
END
$$;
COMMENT ON FUNCTION tollgate.states_of_users(regclass, text[], text[]) IS
    'User ids, each preceded by a letter: d for a user who is not in a table, i for one who is inactive there, a for any other. Internal.';

CREATE FUNCTION tollgate.users_in_state(states text[], state text) RETURNS text[]
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT ARRAY(SELECT substr(s, 2) FROM unnest($1) s WHERE starts_with(s, $2));
END;
COMMENT ON FUNCTION tollgate.users_in_state(text[], text) IS 'The users in a state, from the result of states_of_users. Internal.';

-- Uses the index: see revoke_without_notification.
CREATE FUNCTION tollgate.users_with_tokens(user_ids text[]) RETURNS text[]
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
    SET plan_cache_mode = force_generic_plan
    SET jit = off
    SET enable_seqscan = off
    SET enable_hashjoin = off
    SET enable_mergejoin = off
AS $$
BEGIN
    PERFORM tollgate.check_snapshot(NULL, $1);
    RETURN ARRAY(SELECT u.id FROM unnest($1) WITH ORDINALITY u (id, n)
                 WHERE EXISTS (SELECT FROM tollgate.api_tokens t WHERE t.user_id = u.id COLLATE "default" AND t.revoked_at IS NULL)
                 ORDER BY u.n);
END
$$;
COMMENT ON FUNCTION tollgate.users_with_tokens(text[]) IS 'The given users who have a token that is not revoked; 40001 if the snapshot does not show it. Internal.';

CREATE FUNCTION tollgate.disable_tokens_of_users(user_ids text[], source jsonb) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
    SET plan_cache_mode = force_generic_plan
    SET jit = off
    SET enable_seqscan = off
    SET enable_hashjoin = off
    SET enable_mergejoin = off
AS $$
DECLARE
    affected bigint;
BEGIN
    WITH switched AS (
        UPDATE tollgate.api_tokens t SET disabled_at = clock_timestamp(), disabled_with_user = true
            FROM unnest($1) u (id) WHERE t.user_id = u.id COLLATE "default" AND t.revoked_at IS NULL AND t.disabled_at IS NULL
            RETURNING t.id, t.user_id
    ), logged AS (
        INSERT INTO tollgate.audit_log (event, token_id, user_id, detail, epoch)
            SELECT 'token.disabled', s.id, s.user_id, jsonb_build_object('reason', 'the user is not active') || $2, (SELECT tollgate.current_epoch())
            FROM switched s ORDER BY s.id
    )
    SELECT count(*) INTO affected FROM switched;
    RETURN affected;
END
$$;
COMMENT ON FUNCTION tollgate.disable_tokens_of_users(text[], jsonb) IS
    'Disables the tokens of inactive users, except those that are already disabled, and returns how many; one event each. Their families are locked. Internal.';

CREATE FUNCTION tollgate.enable_tokens_of_users(user_ids text[], source jsonb) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
    SET plan_cache_mode = force_generic_plan
    SET jit = off
    SET enable_seqscan = off
    SET enable_hashjoin = off
    SET enable_mergejoin = off
AS $$
DECLARE
    affected bigint;
BEGIN
    WITH switched AS (
        UPDATE tollgate.api_tokens t SET disabled_at = NULL, disabled_with_user = false
            FROM unnest($1) u (id) WHERE t.user_id = u.id COLLATE "default" AND t.revoked_at IS NULL AND t.disabled_with_user
            RETURNING t.id, t.user_id
    ), logged AS (
        INSERT INTO tollgate.audit_log (event, token_id, user_id, detail, epoch)
            SELECT 'token.enabled', s.id, s.user_id, jsonb_build_object('reason', 'the user is active again') || $2, (SELECT tollgate.current_epoch())
            FROM switched s ORDER BY s.id
    )
    SELECT count(*) INTO affected FROM switched;
    RETURN affected;
END
$$;
COMMENT ON FUNCTION tollgate.enable_tokens_of_users(text[], jsonb) IS
    'Enables the tokens that were disabled with their users, and returns how many; one event each. Internal.';

CREATE FUNCTION tollgate.lock_tokens_of_users(user_ids text[]) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
    SET plan_cache_mode = force_generic_plan
    SET jit = off
    SET enable_seqscan = off
    SET enable_hashjoin = off
    SET enable_mergejoin = off
AS $$
DECLARE
    locked bigint;
BEGIN
    -- The roots of families, in the order of families.sql. Nothing is issued meanwhile: the rows of the users are
    -- locked.
    SELECT count(*) INTO locked FROM (
        SELECT FROM unnest($1) u (id) JOIN tollgate.api_tokens t ON t.user_id = u.id COLLATE "default"
        WHERE t.parent_id IS NULL AND t.revoked_at IS NULL ORDER BY t.user_id COLLATE "C", t.id FOR UPDATE OF t) l;
    PERFORM tollgate.check_snapshot(NULL, $1);
END
$$;
COMMENT ON FUNCTION tollgate.lock_tokens_of_users(text[]) IS 'Locks the families of some users'' tokens. Internal.';

CREATE FUNCTION tollgate.settle_users(users regclass, arguments text[], user_ids text[], operation text, OUT revoked bigint, OUT disabled bigint)
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    source  jsonb := jsonb_build_object('users_table', $1);
    states  text[];
    those    text[];
    another record;
    -- Of access tokens nothing is stored: where keys sign them, or an issuer is trusted, any user may have some.
    signs   boolean := EXISTS (SELECT FROM tollgate.sealed_keys) OR EXISTS (SELECT FROM tollgate.issuers i WHERE i.distrusted_at IS NULL);
BEGIN
    revoked := 0;
    disabled := 0;
    $3 := tollgate.without_services($3);
    IF NOT signs THEN
        $3 := tollgate.users_with_tokens($3);
    END IF;
    IF cardinality($3) = 0 THEN
        RETURN;
    END IF;
    -- Concurrent calls for the same user run one after the other, each on what the previous one committed.
    IF $2[4] <> '' THEN
        PERFORM tollgate.lock_tokens_of_users($3);
    END IF;
    states := tollgate.states_of_users($1, $2, $3);
    those := tollgate.users_in_state(states, 'd');
    IF cardinality(those) > 0 AND $4 <> 'REVIEW' THEN
        revoked := tollgate.revoke_without_notification(those,
            CASE $4 WHEN 'UPDATE' THEN 'the user has another key' ELSE 'the user was deleted' END, source);
        PERFORM tollgate.end_access_and_notify(those,
            CASE $4 WHEN 'UPDATE' THEN 'the user has another key' ELSE 'the user was deleted' END, source) WHERE signs;
    END IF;
    IF $2[4] = '' THEN
        RETURN;
    END IF;
    those := tollgate.users_in_state(states, 'i');
    IF cardinality(those) > 0 THEN
        IF $2[3] = 'revoke' THEN
            revoked := revoked + tollgate.revoke_without_notification(those, 'the user is not active', source);
        ELSE
            disabled := tollgate.disable_tokens_of_users(those, source);
        END IF;
        PERFORM tollgate.end_access_and_notify(those, 'the user is not active', source) WHERE signs;
    END IF;
    those := tollgate.users_in_state(states, 'a');
    -- A user who is inactive in one table is inactive.
    FOR another IN SELECT a.* FROM tollgate.attached_users_tables() a WHERE a.users <> $1 AND a.arguments[4] <> '' LOOP
        EXIT WHEN cardinality(those) = 0;
        states := tollgate.states_of_users(another.users, another.arguments, those);
        those := tollgate.users_in_state(states, 'a') || tollgate.users_in_state(states, 'd');
    END LOOP;
    IF cardinality(those) > 0 THEN
        PERFORM tollgate.enable_tokens_of_users(those, source);
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.settle_users(regclass, text[], text[], text) IS
    'Applies a table''s state to the tokens of some users: revokes those of users who are no longer in it, and disables, revokes or enables as its condition says; returns how many it revoked and disabled. Ends the access tokens and sessions of both. Internal.';

CREATE FUNCTION tollgate.tokens_are_received() RETURNS boolean
    LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    -- What the publisher did to the tokens of its users arrives as rows, and so do the events: nothing is done twice.
    SELECT tollgate.is_logical_worker()
           AND EXISTS (SELECT FROM pg_subscription_rel r WHERE r.srrelid = 'tollgate.api_tokens'::regclass);
END;
COMMENT ON FUNCTION tollgate.tokens_are_received() IS
    'Whether this process applies the changes of a subscription in a database that subscribes to tokens. Internal.';

CREATE FUNCTION tollgate.settle_and_notify(users oid, arguments text[], user_ids text[], operation text) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    settled record;
BEGIN
    IF tollgate.tokens_are_received() THEN
        RETURN;
    END IF;
    SELECT s.* INTO settled FROM tollgate.settle_users($1, $2, $3, $4) s;
    PERFORM tollgate.notify_of_users(settled.revoked, settled.disabled, $3[1]);
END
$$;
COMMENT ON FUNCTION tollgate.settle_and_notify(oid, text[], text[], text) IS 'settle_users for the trigger of a row. Internal.';

CREATE FUNCTION tollgate.notify_of_users(revoked bigint, disabled bigint, user_id text) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF $1 > 0 THEN
        PERFORM tollgate.notify_token_event('token.revoked', NULL, $3, NULL, $1);
    END IF;
    IF $2 > 0 THEN
        PERFORM tollgate.notify_token_event('token.disabled', NULL, $3, NULL, $2);
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.notify_of_users(bigint, bigint, text) IS 'Notifies that tokens of one user, or of several, were revoked and disabled. Internal.';

CREATE FUNCTION tollgate.settle_user(user_id text) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM tollgate.settle_and_notify(a.users::oid, a.arguments, ARRAY[$1], 'REVIEW')
        FROM tollgate.attached_users_tables() a WHERE a.arguments[4] <> '';
END
$$;
COMMENT ON FUNCTION tollgate.settle_user(text) IS 'Applies the conditions of attached tables to the tokens of a user. Internal.';

CREATE FUNCTION tollgate.settle_all_users(users regclass, arguments text[]) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    keys     text[] := '{}';
    one      text;
    settled  record;
    revoked  bigint := 0;
    disabled bigint := 0;
BEGIN
    FOR one IN SELECT t.user_id COLLATE "C" FROM tollgate.api_tokens t WHERE t.revoked_at IS NULL
               UNION SELECT s.user_id FROM tollgate.sessions s WHERE s.revoked_at IS NULL ORDER BY 1 LOOP
        keys := keys || one;
        IF cardinality(keys) >= 50000 THEN
            SELECT s.* INTO settled FROM tollgate.settle_users($1, $2, keys, 'REVIEW') s;
            revoked := revoked + settled.revoked;
            disabled := disabled + settled.disabled;
            keys := '{}';
        END IF;
    END LOOP;
    SELECT s.* INTO settled FROM tollgate.settle_users($1, $2, keys, 'REVIEW') s;
    PERFORM tollgate.notify_of_users(revoked + settled.revoked, disabled + settled.disabled, NULL);
END
$$;
COMMENT ON FUNCTION tollgate.settle_all_users(regclass, text[]) IS
    'Applies the condition of a newly attached table to all tokens and sessions. Internal.';

CREATE FUNCTION tollgate.user_is_inactive(token_id uuid) RETURNS boolean
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'user_is_inactive';
COMMENT ON FUNCTION tollgate.user_is_inactive(uuid) IS
    'Whether a token''s user is in an attached table and inactive there; locks the user''s rows. Internal.';

-- ---- Triggers. They run with their owner's rights on another role's table, so they read the table with the rights of
-- its owner, except for the keys that they are passed.

CREATE FUNCTION tollgate.users_row_changed() RETURNS trigger
    LANGUAGE c VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'users_row_changed';
COMMENT ON FUNCTION tollgate.users_row_changed() IS
    'Row trigger of attached tables: updates the tokens of the user if the key changed, or a column that the condition reads. Internal: a role that may create a trigger with it may revoke any user''s tokens.';

CREATE FUNCTION tollgate.revoke_departed_users() RETURNS trigger
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    arguments text[] := ARRAY(SELECT unnest(TG_ARGV));
    -- For a partition the whole table, where the user may still be, or be again.
    users     regclass := coalesce(pg_partition_root(TG_RELID), TG_RELID);
    key       text := (tollgate.users_key(TG_RELID, arguments))[1];
    departed  text[];
    one       text;
    keys      text[] := '{}';
    branch    record;
    page      bigint;
    settled   record;
    revoked   bigint := 0;
    disabled  bigint := 0;
    n         bigint := 0;
BEGIN
    IF tollgate.tokens_are_received() THEN
        RETURN NULL;
    END IF;
    IF TG_OP = 'TRUNCATE' THEN
        -- TRUNCATE removes rows that an old snapshot does not show.
        PERFORM tollgate.check_read_committed(
            'a users table cannot be truncated', format('The tokens of the users of %s must be revoked.', users), 'Truncate it');
        -- Each truncated table has its own trigger, which reads it, except partitions that were added after the attachment.
        -- A hundred pages at a time, some ten thousand users, as there may be any number.
        FOR branch IN SELECT c.oid, c.relowner, pg_relation_size(c.oid) / current_setting('block_size')::bigint AS pages FROM pg_class c
                      WHERE c.relkind = 'r' AND (c.oid = TG_RELID
                          OR c.oid IN (SELECT p.relid FROM pg_partition_tree(TG_RELID) p)
                             AND NOT EXISTS (SELECT FROM pg_trigger o, pg_trigger t
                                             WHERE o.tgrelid = TG_RELID AND o.tgname = TG_NAME
                                               AND t.tgrelid = c.oid AND t.tgfoid = o.tgfoid AND t.tgtype = o.tgtype AND t.tgenabled = o.tgenabled))
        LOOP
            FOR page IN SELECT generate_series(0, branch.pages, 100) LOOP
                departed := tollgate.query_as(branch.relowner, format(
                    'SELECT array_agg(DISTINCT u.%s::text COLLATE "C") FROM ONLY %s u WHERE u.ctid >= %L AND u.ctid < %L',
                    key, branch.oid::regclass, format('(%s,0)', page), format('(%s,0)', page + 100)), NULL);
                departed := tollgate.without_services(departed);
                CONTINUE WHEN cardinality(departed) = 0;
                revoked := revoked + tollgate.revoke_without_notification(departed, 'the user was deleted', jsonb_build_object('users_table', users));
                PERFORM tollgate.end_access_and_notify(departed, 'the user was deleted', jsonb_build_object('users_table', users))
                    WHERE EXISTS (SELECT FROM tollgate.sealed_keys);
                n := n + cardinality(departed);
                one := departed[1];
            END LOOP;
        END LOOP;
    ELSE
        -- A limited number of users at a time, since a statement may delete any number; their table may be read once
        -- per round. In the order in which their tokens are locked.
        FOR one IN EXECUTE format('SELECT DISTINCT d.%s::text COLLATE "C" FROM departed d WHERE d.%1$s IS NOT NULL ORDER BY 1', key) LOOP
            n := n + 1;
            keys := keys || one;
            IF cardinality(keys) >= 50000 THEN
                SELECT s.* INTO settled FROM tollgate.settle_users(users, arguments, keys, TG_OP) s;
                revoked := revoked + settled.revoked;
                disabled := disabled + settled.disabled;
                keys := '{}';
            END IF;
        END LOOP;
        SELECT s.* INTO settled FROM tollgate.settle_users(users, arguments, keys, TG_OP) s;
        revoked := revoked + settled.revoked;
        disabled := disabled + settled.disabled;
    END IF;
    PERFORM tollgate.notify_of_users(revoked, disabled, CASE WHEN n = 1 THEN one END);
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION tollgate.revoke_departed_users() IS
    'Statement trigger of attached tables: revokes the tokens of users who are no longer in them. Internal: a role that may create a trigger with it may revoke any user''s tokens.';
